"""Run GGUF files in llama.cpp, in its own environment: `run_gguf.py JOBS ANSWERS`.

JOBS is a JSON file: a list of models, each with `path`, `prompts` (lists of token ids) and `num_tokens`. ANSWERS gets
for each model the tokens that are generated greedily after each prompt, and its logits after the first prompt.
"""

import json
import sys
from pathlib import Path

import llama_cpp


# Keys and values are kept in float16 otherwise.
PRECISE = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}


def run(path, prompts, num_tokens):
    llama = llama_cpp.Llama(path, n_ctx=128, n_threads=1, logits_all=True, verbose=False, **PRECISE)
    generated = []
    for prompt in prompts:
        llama.reset()
        tokens = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
        generated.append([next(tokens) for _ in range(num_tokens)])
    llama.reset()
    llama.eval(prompts[0])
    logits = llama.scores[: len(prompts[0])].tolist()
    return {"tokens": generated, "logits": logits}


def main():
    jobs, answers = map(Path, sys.argv[1:])
    answers.write_text(json.dumps([run(**job) for job in json.loads(jobs.read_text())]))


if __name__ == "__main__":
    main()
