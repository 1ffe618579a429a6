"""vLLM's own implementations serve exported checkpoints; see `vllm_environment.py`."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from moe_checkpoints import zero_attention_biases
from transformers import PreTrainedModel
from vllm_environment import SHAPE, VllmError, greedy_tokens, regrets, vllm_tokens

from upcycled_moe.cli.main import main


ALL_SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
QWEN3 = {"base_model_type": "qwen3"}
SHARED = {"shared_expert_intermediate_size": 64}
# Target, and the fields of the model that goes there.
EXACT = {
    "mixture, tied": ("qwen2_moe", {"tie_word_embeddings": True, "initializer_range": 0.1}),
    "shared expert, a dense layer, weights below one": (
        "qwen2_moe",
        {
            **SHARED,
            "router_type": "linear",
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
        },
    ),
    "plain shared expert, top-1": (
        "qwen2_moe",
        {**SHARED, "shared_expert_gating": "plain", "num_experts_per_tok": 1},
    ),
    "sliding window in all layers": ("qwen2_moe", ALL_SLIDING),
    "q/k norms, wide heads": ("qwen3_moe", {**QWEN3, "head_dim": 128, "num_key_value_heads": 1}),
    "q/k norms, a dense layer, sliding window": ("qwen3_moe", {**QWEN3, "mlp_only_layers": [0], **ALL_SLIDING}),
    "no biases, sliding window": ("mixtral", {"router_type": "linear", **ALL_SLIDING}),
    "no biases, wide heads": ("mixtral", {"head_dim": 128, "num_key_value_heads": 1}),
}
SOME_SLIDING = {**ALL_SLIDING, "max_window_layers": 1}
# What vLLM's own classes compute otherwise without a word, and its Transformers backend as it is.
OTHERWISE = {
    "sliding window in some layers": ("qwen2_moe", {**SHARED, **SOME_SLIDING}),
    "wide heads": ("qwen2_moe", {**SHARED, "head_dim": 128, "num_key_value_heads": 1}),
    "bias of o_proj": ("qwen3_moe", {**QWEN3, "attention_bias": True}),
}
# What both compute otherwise.
NOWHERE = {
    "GELU in qwen3_moe": ("qwen3_moe", {**QWEN3, "hidden_act": "gelu"}),
    "GELU in mixtral": ("mixtral", {"hidden_act": "gelu"}),
}


@pytest.fixture
def prompts(make_tokens) -> list[list[int]]:
    return [*make_tokens(3, 16).tolist(), make_tokens(1, 5, seed=1)[0].tolist()]


@pytest.fixture
def exported(make_moe, prompts, tmp_path) -> Callable[..., tuple[dict[str, Path], dict[str, list[list[int]]]]]:
    """`exported(kinds)`: the folders of their exports, and the tokens that the originals generate."""

    def export(kinds: dict[str, tuple[str, dict]]) -> tuple[dict[str, Path], dict[str, list[list[int]]]]:
        folders, expected = {}, {}
        for name, (target, fields) in kinds.items():
            model = make_moe(**{**SHAPE, **fields})
            if target == "mixtral":
                zero_attention_biases(model)
            expected[name] = greedy_tokens(model, prompts)
            assert len(set().union(*expected[name])) > 9, f"{name}: a model that repeats itself shows little"
            folders[name] = _write_export(model, target, tmp_path / f"{target}-{name.replace('/', '-')}")
        return folders, expected

    return export


def _write_export(model: PreTrainedModel, target: str, folder: Path) -> Path:
    model.save_pretrained(folder / "upcycled")
    assert main(["export", str(folder / "upcycled"), str(folder / "native"), "--to", target]) == 0
    return folder / "native"


def _vllm_model_impl(folder: Path) -> str | None:
    """Return what the export in `folder` says that vLLM should be told."""
    return json.loads((folder / "upcycling.json").read_text(encoding="utf-8"))["steps"][-1]["vllm_model_impl"]


@pytest.mark.slow
def test_vllm_generates_from_exports_what_transformers_generates_from_the_originals(exported, prompts, tmp_path):
    folders, expected = exported(EXACT)

    assert vllm_tokens(folders, prompts, tmp_path, model_impl="vllm") == expected
    assert {_vllm_model_impl(folder) for folder in folders.values()} == {"vllm"}


@pytest.mark.slow
def test_what_vllm_computes_otherwise_is_what_an_export_says(exported, prompts, tmp_path):
    folders, expected = exported(OTHERWISE)
    others, expected_of_others = exported(NOWHERE)

    own = vllm_tokens(folders | others, prompts, tmp_path, model_impl="vllm")
    by_transformers = vllm_tokens(folders | others, prompts, tmp_path, model_impl="transformers")

    # Where one of these becomes equal, vLLM has learnt it, and its note can go.
    assert not [name for name, tokens in (expected | expected_of_others).items() if own[name] == tokens]
    assert {name: by_transformers[name] for name in folders} == expected
    assert not [name for name, tokens in expected_of_others.items() if by_transformers[name] == tokens]
    assert {_vllm_model_impl(folder) for folder in folders.values()} == {"transformers"}
    assert {_vllm_model_impl(folder) for folder in others.values()} == {None}


@pytest.mark.slow
def test_vllms_transformers_backend_stops_at_a_shared_expert_of_width_zero(exported, prompts, tmp_path):
    folders, expected = exported({"sliding window in some layers": ("qwen2_moe", SOME_SLIDING)})

    assert vllm_tokens(folders, prompts, tmp_path, model_impl="vllm") != expected
    with pytest.raises(VllmError, match=f"exit status {-signal.SIGFPE}"):
        vllm_tokens(folders, prompts, tmp_path, model_impl="transformers")
    assert {_vllm_model_impl(folder) for folder in folders.values()} == {None}


@pytest.mark.slow
def test_vllm_runs_an_export_in_bfloat16(make_moe, prompts, tmp_path):
    model = make_moe(**SHAPE).to(torch.bfloat16)
    folder = _write_export(model, "qwen2_moe", tmp_path / "bfloat16")

    generated = vllm_tokens({"": folder}, prompts, tmp_path, model_impl="vllm", dtype="bfloat16")[""]

    # Rounding changes which of two near tokens comes first; a token at random falls short by more than 1.
    model.float()
    found = [regrets(model, *pair) for pair in zip(prompts, generated, strict=True)]
    assert torch.tensor(found).mean() < 0.05
