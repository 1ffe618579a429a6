"""Generate greedily in vLLM, in its own environment: `generate.py JOBS ANSWERS`.

JOBS is a JSON file: a list of models, each with `folder`, `model_impl`, `trust_remote_code`, `dtype`, `prompts` (lists
of token ids) and `num_tokens`. ANSWERS gets a list with the generated token ids of each model's prompts. One process
runs them all: the imports and kernels take longer than small models do.
"""

import gc
import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def generate(folder, model_impl, trust_remote_code, dtype, prompts, num_tokens):
    llm = LLM(
        folder,
        model_impl=model_impl,
        trust_remote_code=trust_remote_code,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=dtype,
        max_model_len=256,
    )
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    # The next model wants the memory of this one.
    llm.llm_engine.engine_core.shutdown()
    return answers


def main():
    jobs, answers = map(Path, sys.argv[1:])
    generated = []
    for job in json.loads(jobs.read_text()):
        generated.append(generate(**job))
        gc.collect()
    answers.write_text(json.dumps(generated))


if __name__ == "__main__":
    main()
