"""Generate greedily in vLLM, in its own environment: `generate.py FOLDER PROMPTS NUM_TOKENS ANSWERS`.

Prompts are lists of token ids as JSON, and so are the answers, written to the file ANSWERS.
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main():
    folder, prompts, num_tokens, answers = sys.argv[1:]
    llm = LLM(
        folder,
        model_impl="transformers",
        trust_remote_code=True,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=256,
    )
    sampling = SamplingParams(temperature=0, max_tokens=int(num_tokens), detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in json.loads(prompts)], sampling)
    Path(answers).write_text(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))


if __name__ == "__main__":
    main()
