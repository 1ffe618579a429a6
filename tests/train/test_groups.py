"""Every parameter of the models that are trained belongs to a group."""

from collections import defaultdict

import pytest
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from modeling_upcycled_moe import UpcycledQwenMoeConfig, UpcycledQwenMoeForCausalLM
from upcycled_moe.train.groups import PARAMETER_GROUPS, parameter_group


SHAPE = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
}
MOE_SHAPE = {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0], "moe_intermediate_size": 8}


def _groups(model):
    groups = defaultdict(set)
    for name, _ in model.named_parameters():
        groups[parameter_group(name)].add(name.removeprefix("model.layers.1."))
    return groups


@pytest.mark.parametrize("router_type", ["linear", "mixture", "mlp"])
def test_an_upcycled_model(router_type):
    config = UpcycledQwenMoeConfig(
        **MOE_SHAPE,
        base_model_type="qwen3",
        router_type=router_type,
        shared_expert_intermediate_size=8,
        shared_expert_gating="sigmoid",
        num_constant_experts=1,
    )
    groups = _groups(UpcycledQwenMoeForCausalLM(config))
    assert all(name.startswith("mlp.gate.") for name in groups["routers"])
    assert len(groups["routers"]) == {"linear": 1, "mixture": 2, "mlp": 2}[router_type]
    assert {"mlp.experts.gate_up_proj", "mlp.constant_experts.vectors"} <= groups["experts"]
    assert {"mlp.shared_expert.gate_proj.weight", "mlp.shared_expert_gate.weight"} <= groups["mlp"]
    assert "model.layers.0.mlp.gate_proj.weight" in groups["mlp"]
    assert {"self_attn.q_norm.weight", "input_layernorm.weight", "model.norm.weight"} <= groups["norms"]
    assert groups["head"] == {"lm_head.weight"}
    assert set(groups) == set(PARAMETER_GROUPS) - {"other"}


@pytest.mark.parametrize(
    "config",
    [
        Qwen2MoeConfig(**MOE_SHAPE, shared_expert_intermediate_size=8),
        Qwen3MoeConfig(**MOE_SHAPE),
        Qwen3Config(**SHAPE),
    ],
    ids=lambda config: config.model_type,
)
def test_stock_models(config):
    groups = _groups(AutoModelForCausalLM.from_config(config))
    assert "other" not in groups
    is_moe = hasattr(config, "num_experts")
    assert groups["routers"] == ({"mlp.gate.weight"} if is_moe else set())
    assert groups["experts"] == ({"mlp.experts.gate_up_proj", "mlp.experts.down_proj"} if is_moe else set())
    assert "self_attn.q_proj.weight" in groups["attention"]


def test_names_that_wrappers_make():
    assert parameter_group("module._orig_mod.model.layers.3.mlp.gate.keys") == "routers"
    assert parameter_group("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight") == "attention"
    assert parameter_group("base_model.model.model.layers.0.mlp.experts.lora_B.default.weight") == "experts"
    assert parameter_group("anything.else") == "other"
