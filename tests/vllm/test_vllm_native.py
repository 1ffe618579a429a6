"""vLLM's own implementations serve exported checkpoints; see `vllm_environment.py`."""

import pytest
import torch
from vllm_environment import SHAPE, greedy_tokens, vllm_tokens

from upcycled_moe.cli.main import main


ALL_SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
# Target, and the fields of the model that goes there.
MODELS = {
    "mixture, tied": ("qwen2_moe", {"tie_word_embeddings": True, "initializer_range": 0.1}),
    "shared expert, a dense layer, weights below one": (
        "qwen2_moe",
        {
            "router_type": "linear",
            "shared_expert_intermediate_size": 64,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
        },
    ),
    "plain shared expert, top-1": (
        "qwen2_moe",
        {"shared_expert_intermediate_size": 64, "shared_expert_gating": "plain", "num_experts_per_tok": 1},
    ),
    "sliding window in all layers": ("qwen2_moe", ALL_SLIDING),
    "q/k norms, wide heads": (
        "qwen3_moe",
        {"base_model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 1},
    ),
    "q/k norms, a dense layer, sliding window": (
        "qwen3_moe",
        {"base_model_type": "qwen3", "mlp_only_layers": [0], **ALL_SLIDING},
    ),
    "no biases, sliding window": ("mixtral", {"router_type": "linear", **ALL_SLIDING}),
}


@pytest.mark.slow
def test_vllm_generates_from_exports_what_transformers_generates_from_the_originals(make_moe, make_tokens, tmp_path):
    prompts = [*make_tokens(3, 16).tolist(), make_tokens(1, 5, seed=1)[0].tolist()]
    folders, expected = {}, {}
    for name, (target, fields) in MODELS.items():
        model = make_moe(**{**SHAPE, **fields})
        if target == "mixtral":
            _zero_attention_biases(model)
        expected[name] = greedy_tokens(model, prompts)
        assert len(set().union(*expected[name])) > 9, f"{name}: a model that repeats itself shows little"
        original, folders[name] = tmp_path / f"{len(folders)}-upcycled", tmp_path / f"{len(folders)}-native"
        model.save_pretrained(original)
        assert main(["export", str(original), str(folders[name]), "--to", target]) == 0

    assert vllm_tokens(folders, prompts, tmp_path, model_impl="vllm") == expected


@torch.no_grad()
def _zero_attention_biases(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            parameter.zero_()
