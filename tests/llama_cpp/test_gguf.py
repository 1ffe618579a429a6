"""llama.cpp computes from GGUF files of exported checkpoints what Transformers computes from the originals.

Converter and library come from the sources of llama-cpp-python, in an environment of their own:

    python -m venv .venv-gguf
    .venv-gguf/bin/pip install torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
    .venv-gguf/bin/pip install transformers==5.19.0 gguf==0.19.0 sentencepiece scikit-build-core
    .venv-gguf/bin/pip install numpy jinja2 diskcache typing-extensions
    .venv-gguf/bin/pip download --no-deps --no-build-isolation --no-binary :all: llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B llama-build -DLLAMA_BUILD_COMMON=OFF
    cmake --build llama-build --target llama --parallel
    .venv-gguf/bin/pip install --no-deps --no-build-isolation \
        -C cmake.args="-DLLAMA_BUILD=OFF;-DLLAVA_BUILD=OFF" ./llama_cpp_python-0.3.36
    export LLAMA_CPP_LIB_PATH=$PWD/llama-build/bin UPCYCLED_MOE_LLAMA_CPP=$PWD/llama_cpp_python-0.3.36/vendor/llama.cpp
    UPCYCLED_MOE_LLAMA_CPP_PYTHON=.venv-gguf/bin/python python -m pytest tests/llama_cpp -m slow
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from dense_checkpoints import byte_level_tokenizer
from moe_checkpoints import zero_attention_biases

from modeling_upcycled_moe import UpcycledQwenMoeForSequenceClassification
from upcycled_moe.cli.main import main


NUM_TOKENS = 24
SHAPE = {"vocab_size": 320, "hidden_size": 256, "num_attention_heads": 4, "initializer_range": 0.06}
SHARED = {"router_type": "linear", "shared_expert_intermediate_size": 64}
QWEN3 = {"base_model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 1}
ALL_SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
# Target, and the fields of the model that goes there.
EXACT = {
    "shared expert, weights below one": ("qwen2_moe", {**SHARED, "norm_topk_prob": False}),
    "mixture, q/k norms, tied": ("qwen3_moe", {**QWEN3, "tie_word_embeddings": True}),
    "mixture, no biases, tied": ("mixtral", {"tie_word_embeddings": True}),
}
# What llama.cpp computes otherwise without a word; the notes of an export and its page name these.
OTHERWISE = {
    "qwen2_moe with weights that sum to one": ("qwen2_moe", SHARED),
    "qwen3_moe with weights below one": ("qwen3_moe", {**QWEN3, "norm_topk_prob": False}),
    "qwen3_moe with a sliding window": ("qwen3_moe", {**QWEN3, **ALL_SLIDING}),
    "mixtral with a sliding window": ("mixtral", ALL_SLIDING),
    "qwen2_moe with GELU": ("qwen2_moe", {**SHARED, "norm_topk_prob": False, "hidden_act": "gelu"}),
    "qwen3_moe with GELU": ("qwen3_moe", {**QWEN3, "hidden_act": "gelu"}),
    "mixtral with GELU": ("mixtral", {"hidden_act": "gelu"}),
}
# What the converter or the library refuses; the notes of an export name these too.
REFUSED = {
    "qwen2_moe without shared expert": ("qwen2_moe", {"norm_topk_prob": False}),
    "qwen2_moe, tied": ("qwen2_moe", {**SHARED, "norm_topk_prob": False, "tie_word_embeddings": True}),
    "qwen2_moe with wide heads": ("qwen2_moe", {**SHARED, "norm_topk_prob": False, "head_dim": 128}),
    "qwen2_moe with a dense layer": ("qwen2_moe", {**SHARED, "norm_topk_prob": False, "mlp_only_layers": [0]}),
    "qwen3_moe with a dense layer": ("qwen3_moe", {**QWEN3, "mlp_only_layers": [0]}),
    "qwen3_moe with attention biases": ("qwen3_moe", {**QWEN3, "attention_bias": True}),
    "a classifier": ("qwen3_moe", {**QWEN3, "model_class": UpcycledQwenMoeForSequenceClassification}),
}


class LlamaCppError(Exception):
    """What a script in the environment of llama.cpp ended with."""


@pytest.fixture
def llama_cpp():
    """`llama_cpp(script, *arguments)` runs a script of this folder in the environment of llama.cpp.

    Raises:
        LlamaCppError: if it fails.
    """
    python = os.environ.get("UPCYCLED_MOE_LLAMA_CPP_PYTHON")
    if not python:
        pytest.skip("UPCYCLED_MOE_LLAMA_CPP_PYTHON does not name the interpreter of an environment with llama.cpp")

    def run(script: str, *arguments: str | Path) -> None:
        process = subprocess.run(
            [python, Path(__file__).with_name(script), *arguments],
            env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            capture_output=True,
            text=True,
        )
        if process.returncode != 0:
            raise LlamaCppError(process.stderr[-5000:])

    return run


@pytest.mark.slow
def test_a_gguf_computes_what_the_original_does_where_the_export_says_so(make_moe, llama_cpp, tmp_path):
    prompts = torch.randint(3, 300, (3, 16), generator=torch.Generator().manual_seed(0))
    jobs, expected_tokens, expected_logits = [], {}, {}
    for name, (target, fields) in {**EXACT, **OTHERWISE}.items():
        model = make_moe(**{**SHAPE, **fields})
        if target == "mixtral":
            zero_attention_biases(model)
        path = _write_gguf(model, target, tmp_path / target / str(len(jobs)), llama_cpp)
        jobs.append({"path": str(path), "prompts": prompts.tolist(), "num_tokens": NUM_TOKENS})
        with torch.no_grad():
            expected_logits[name] = model(prompts[:1]).logits[0]
            tokens = model.generate(prompts, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None)
        expected_tokens[name] = tokens[:, prompts.shape[1] :].tolist()

    answers = dict(zip(expected_tokens, _run(jobs, tmp_path, llama_cpp), strict=True))

    difference = {
        name: (torch.tensor(answer["logits"]) - expected_logits[name]).abs().max().item()
        for name, answer in answers.items()
    }
    assert {name: answers[name]["tokens"] for name in EXACT} == {name: expected_tokens[name] for name in EXACT}
    assert max(difference[name] for name in EXACT) <= 2e-5, difference
    # Where one of these becomes equal, llama.cpp has learnt it, and its note can go.
    assert min(difference[name] for name in OTHERWISE) > 0.1, difference


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_load_is_what_an_export_says(name, make_moe, llama_cpp, tmp_path):
    target, fields = REFUSED[name]
    model = make_moe(**{**SHAPE, **fields})

    with pytest.raises(LlamaCppError, match=r"Can not map tensor|Failed to load model|is not supported"):
        _convert_and_run(model, target, tmp_path, llama_cpp)

    notes = json.loads((tmp_path / "native" / "upcycling.json").read_text(encoding="utf-8"))["steps"][-1]["notes"]
    assert any(note.startswith("llama.cpp cannot load this") for note in notes)
    assert not any("a GGUF of this computes something else" in note for note in notes)


def _convert_and_run(model: torch.nn.Module, target: str, folder: Path, llama_cpp) -> None:
    path = _write_gguf(model, target, folder, llama_cpp)
    _run([{"path": str(path), "prompts": [[5, 6, 7]], "num_tokens": 1}], folder, llama_cpp)


def _run(jobs: list[dict], scratch: Path, llama_cpp) -> list[dict]:
    """Return what llama.cpp answers; see `run_gguf.py`."""
    (scratch / "jobs.json").write_text(json.dumps(jobs))
    llama_cpp("run_gguf.py", scratch / "jobs.json", scratch / "answers.json")
    return json.loads((scratch / "answers.json").read_text())


def _write_gguf(model: torch.nn.Module, target: str, folder: Path, llama_cpp) -> Path:
    """Export `model` to `target`, convert that, and return the GGUF file."""
    sources = os.environ["UPCYCLED_MOE_LLAMA_CPP"]
    model.save_pretrained(folder / "upcycled")
    byte_level_tokenizer().save_pretrained(folder / "upcycled")
    assert main(["export", str(folder / "upcycled"), str(folder / "native"), "--to", target]) == 0
    llama_cpp("convert_to_gguf.py", sources, folder / "native", folder / "model.gguf")
    return folder / "model.gguf"
