"""vLLM's Transformers backend serves upcycled checkpoints with their remote code; see `vllm_environment.py`."""

import pytest
import torch
from vllm_environment import SHAPE, greedy_tokens, regrets, vllm_tokens

from modeling_upcycled_moe import UpcycledQwenMoeForCausalLM
from upcycled_moe.cli.main import main


# Every kind of router, selection, shared expert and expert without computation; one window and one top-1.
MODELS = {
    "mixture": {},
    "best key, shared expert, a dense layer": {
        "base_model_type": "qwen3",
        "num_routers": 8,
        "router_pooling": "max",
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [0],
    },
    "sliding window in some layers, top-1": {
        "router_type": "linear",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
        "num_experts_per_tok": 1,
        "norm_topk_prob": False,
    },
    "wide heads": {"head_dim": 128, "num_key_value_heads": 1},
    "top-p": {"router_selection": "top_p", "router_top_p": 0.6, "num_experts_per_tok": 3},
    "experts without computation": {"num_zero_experts": 2, "num_copy_experts": 1, "num_constant_experts": 1},
    "sigmoid scores with biases": {
        "router_type": "linear",
        "router_score_function": "sigmoid",
        "use_router_bias": True,
    },
    "groups": {"router_type": "grouped_average", "router_selection": "grouped_top_k", "num_expert_groups": 2},
    "complementary shared expert, tied": {
        "router_type": "mlp",
        "shared_expert_intermediate_size": 64,
        "shared_expert_gating": "complement",
        "tie_word_embeddings": True,
    },
    "plain shared expert, routers in float32": {
        "base_model_type": "qwen3",
        "router_dtype": "float32",
        "shared_expert_intermediate_size": 64,
        "shared_expert_gating": "plain",
    },
}


@pytest.mark.slow
def test_vllm_generates_the_tokens_that_transformers_generates(make_moe, make_tokens, tmp_path):
    prompts = [*make_tokens(3, 16).tolist(), make_tokens(1, 5, seed=1)[0].tolist()]
    folders, expected = {}, {}
    for name, fields in MODELS.items():
        model = make_moe(**SHAPE, **fields)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                # Such biases decide between experts only if they are as far apart as scores are.
                buffer.copy_(torch.linspace(-0.5, 0.5, len(buffer)))
        expected[name] = greedy_tokens(model, prompts)
        assert len(set().union(*expected[name])) > 12, f"{name}: a model that repeats itself shows little"
        folders[name] = tmp_path / str(len(folders))
        model.save_pretrained(folders[name])

    assert vllm_tokens(folders, prompts, tmp_path, model_impl="transformers", own_code=True) == expected


@pytest.fixture
def converted(dense, text_file, tmp_path):
    """What `convert` makes of checkpoints in bfloat16 whose tokenizer is beside them."""
    folders = {"qwen2": tmp_path / "from-qwen2", "qwen3": tmp_path / "from-qwen3"}
    text = ["--calibration-data", str(text_file), "--calibration-tokens", "512", "--calibration-block-size", "64"]
    for family, folder in folders.items():
        head_dim = {"head_dim": 64} if family == "qwen3" else {}
        parent = dense(family, dtype=torch.bfloat16, **SHAPE, **head_dim)
        assert main(["convert", str(parent), str(folder), "--num-experts", "4", "--experts", "drop", *text]) == 0
    return folders


@pytest.mark.slow
def test_vllm_loads_converted_checkpoints_in_float32_and_in_bfloat16(converted, make_tokens, tmp_path):
    prompts = make_tokens(4, 16).tolist()
    models = {
        name: UpcycledQwenMoeForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, folder in converted.items()
    }

    in_float32 = vllm_tokens(converted, prompts, tmp_path, model_impl="transformers", own_code=True)
    in_bfloat16 = vllm_tokens(converted, prompts, tmp_path, model_impl="transformers", own_code=True, dtype="bfloat16")

    assert in_float32 == {name: greedy_tokens(model, prompts) for name, model in models.items()}
    for name, model in models.items():
        # Rounding changes which of two near experts a token goes to, and which of two near tokens comes first; it does
        # not make bad ones the best. A token at random falls short by more than 1.
        found = [regrets(model, *pair) for pair in zip(prompts, in_bfloat16[name], strict=True)]
        assert torch.tensor(found).mean() < 0.05, name
