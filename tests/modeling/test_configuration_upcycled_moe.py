import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from modeling_upcycled_moe import UpcycledQwenMoeConfig


SHAPE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}

IMPOSSIBLE = [
    ({"num_experts": 0}, "num_experts=0 must be at least 1"),
    ({"num_experts": "8"}, "'num_experts' expected int, got str"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be at least 1"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds num_experts=8; lower it or add experts"),
    ({"intermediate_size": 0}, "intermediate_size=0 must be at least 1"),
    ({"moe_intermediate_size": 0}, "moe_intermediate_size=0 must be at least 1"),
    ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size=-1 is negative"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 must be at least 1"),
    ({"decoder_sparse_step": 5}, "No layer has experts with decoder_sparse_step=5"),
    ({"mlp_only_layers": [0, 1, 2, 3]}, "No layer has experts"),
    ({"mlp_only_layers": [1, 4]}, r"mlp_only_layers names \[4\], but layers run from 0 to 3"),
    ({"mlp_only_layers": [-1]}, r"mlp_only_layers names \[-1\]"),
    ({"num_hidden_layers": 0}, "No layer has experts"),
    ({"base_model_type": "llama"}, "'base_model_type' expected one of .*got llama"),
    ({"attention_bias": False}, "attention_bias=False is impossible with base_model_type='qwen2'"),
    ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
    ({"head_dim": 0}, "head_dim=0 must be at least 1"),
    ({"head_dim": 15}, "even"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads=0"),
    ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ({"layer_types": ["sliding_attention"] * 4}, "there is no sliding window"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types"),
    ({"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer_types has chunked_attention"),
    ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0 must be at least 1"),
    ({"router_type": "roulette"}, "'router_type' expected one of .*got roulette"),
    ({"router_pooling": "mean"}, "'router_pooling' expected one of .*got mean"),
    ({"num_routers": 0}, "num_routers=0 must be at least 1"),
    ({"num_router_keys": 0}, "num_router_keys=0 must be at least 1"),
    ({"router_head_dim": 0}, "router_head_dim=0 must be at least 1"),
    ({"num_router_keys": 12}, "num_router_keys=12 is not a multiple of num_experts=8"),
    ({"use_router_bias": True, "shared_expert_intermediate_size": 8, "shared_expert_gating": "complement"}, "no use_"),
    ({"router_bias_update_rate": 0.1}, "router_bias_update_rate=0.1 has no meaning with use_router_bias=False"),
    ({"router_type": "linear", "num_routers": 8}, "router_type='linear' does not use num_routers"),
    ({"router_type": "linear", "num_router_keys": 8}, "router_type='linear' does not use num_router_keys"),
    ({"router_type": "linear", "router_head_dim": 8}, "router_type='linear' does not use router_head_dim"),
    ({"router_type": "linear", "router_pooling": "max"}, "router_type='linear' does not use router_pooling"),
    ({"router_jitter_noise": 1.0}, r"router_jitter_noise=1.0 is outside \[0, 1\)"),
    ({"router_jitter_noise": -0.1}, "router_jitter_noise=-0.1 is outside"),
    ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef=-0.1 is outside"),
    ({"router_z_loss_coef": float("nan")}, "router_z_loss_coef=nan is outside"),
    ({"num_zero_experts": -1}, "num_zero_experts=-1 is negative"),
    (
        {"num_copy_experts": 1, "num_experts_per_tok": 10},
        "num_experts_per_tok=10 exceeds num_experts=8 and 1 without computation",
    ),
    (
        {"num_copy_experts": 1, "num_router_keys": 8},
        "num_router_keys=8 is not a multiple of num_experts=8 and 1 without",
    ),
    ({"router_type": "grouped_average", "num_experts": 7}, "num_experts=7 does not divide hidden_size=64"),
    ({"router_selection": "best"}, "'router_selection' expected one of .*got best"),
    ({"num_expert_groups": 2}, "router_selection='top_k' does not use num_expert_groups"),
    ({"router_selection": "grouped_top_k"}, "router_selection='grouped_top_k' needs num_expert_groups"),
    ({"router_selection": "grouped_top_k", "num_expert_groups": 0}, "needs num_expert_groups, at least 1"),
    ({"router_selection": "grouped_top_k", "num_expert_groups": 3}, "num_experts=8 is not a multiple of num_expert"),
    ({"router_selection": "prototype_top_k", "num_expert_groups": 4}, "num_experts_per_tok=2 is not a multiple"),
    ({"router_selection": "top_p"}, r"router_selection='top_p' needs router_top_p in \(0, 1\], not None"),
    ({"router_selection": "top_p", "router_top_p": 1.5}, r"needs router_top_p in \(0, 1\], not 1.5"),
    ({"router_top_p": 0.5}, "router_selection='top_k' does not use router_top_p"),
    (
        {"router_selection": "top_p", "router_top_p": 0.5, "router_score_function": "sigmoid"},
        "use router_score_function='softmax'",
    ),
    ({"router_selection": "expert_choice", "use_router_bias": True}, "use_router_bias=True has no meaning"),
    ({"router_selection": "expert_choice", "num_zero_experts": 1}, "num_zero_experts, .* do not go with"),
    ({"router_bias_update_rate": -1.0}, "router_bias_update_rate=-1.0 is outside"),
    ({"shared_expert_gating": "plain"}, "shared_expert_gating='plain' has no meaning without a shared expert"),
    (
        {"shared_expert_gating": "complement", "shared_expert_intermediate_size": 8, "norm_topk_prob": False},
        "shared_expert_gating='complement' settles all weights itself; it needs norm_topk_prob=True",
    ),
    ({"router_entropy_loss_coef": -0.1}, "router_entropy_loss_coef=-0.1 is outside"),
    ({"router_locality_loss_coef": 0.1}, "router_locality_loss_coef needs expert_nodes"),
    ({"expert_nodes": [0, 1]}, r"expert_nodes=\[0, 1\] must name a node, from 0, for each of the 8 experts"),
    ({"expert_nodes": [-1] * 8}, "must name a node, from 0"),
]

POSSIBLE = {
    "defaults": {},
    "linear": {"router_type": "linear"},
    "keys of twelve routers": {"num_routers": 12},
    "best of two keys": {"num_routers": 16, "router_pooling": "max"},
    "shared expert": {"shared_expert_intermediate_size": 32},
    "some dense layers": {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "sliding": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    "qwen3": {"base_model_type": "qwen3", "head_dim": 32},
    "deepseek": {"router_score_function": "sigmoid", "use_router_bias": True, "router_bias_update_rate": 0.01},
    "groups": {"router_selection": "grouped_top_k", "num_expert_groups": 2},
    "top p": {"router_selection": "top_p", "router_top_p": 0.4, "router_entropy_loss_coef": 0.01},
    "without computation": {"num_zero_experts": 1, "num_constant_experts": 2},
    "nodes": {"router_locality_loss_coef": 0.1, "expert_nodes": [0, 0, 0, 0, 1, 1, 1, 1]},
}


@pytest.mark.parametrize(
    ("fields", "message"), IMPOSSIBLE, ids=lambda value: str(value) if type(value) is dict else ""
)
def test_an_impossible_combination_is_one_clear_error(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        UpcycledQwenMoeConfig(**{**SHAPE, **fields})


@pytest.mark.parametrize(("misspelt", "meant"), [("num_expert", "num_experts"), ("router_poolling", "router_pooling")])
def test_a_misspelt_field_is_an_error_with_a_hint(misspelt, meant):
    with pytest.raises(ValueError, match=f"no field '{misspelt}'; did you mean '{meant}'"):
        UpcycledQwenMoeConfig(**SHAPE, **{misspelt: 4})


@pytest.mark.parametrize("fields", POSSIBLE.values(), ids=POSSIBLE)
def test_a_configuration_survives_its_file(tmp_path, fields):
    config = UpcycledQwenMoeConfig(**SHAPE, **fields)
    config.save_pretrained(tmp_path)

    loaded = AutoConfig.from_pretrained(tmp_path)

    assert type(loaded) is UpcycledQwenMoeConfig
    assert loaded.to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)}


def test_the_file_says_num_experts_and_explicit_values(tmp_path):
    """vLLM and the exporters read these names; a default that depends on others must not be left to the reader."""
    UpcycledQwenMoeConfig(**SHAPE, num_experts=16, num_routers=8).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())

    assert "num_local_experts" not in written
    assert "base_model_tp_plan" not in written
    expected = {
        "num_experts": 16,
        "num_routers": 8,
        "num_router_keys": 16,
        "router_head_dim": 8,  # 4 heads of 16 for 8 routers: half a head each
        "head_dim": 16,
        "moe_intermediate_size": written["intermediate_size"],
        "layer_types": ["full_attention"] * 4,
    }
    assert {name: written[name] for name in expected} == expected


def test_num_local_experts_reads_and_writes_num_experts():
    config = UpcycledQwenMoeConfig(**SHAPE, num_local_experts=4)

    assert (config.num_experts, config.num_local_experts) == (4, 4)


@pytest.mark.parametrize(
    ("fields", "moe_layers"),
    [
        ({}, [0, 1, 2, 3]),
        ({"decoder_sparse_step": 2}, [1, 3]),
        ({"mlp_only_layers": [0, 3]}, [1, 2]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [3]),
    ],
    ids=str,
)
def test_which_layers_have_experts(make_moe, fields, moe_layers):
    model = make_moe(num_hidden_layers=4, **fields)

    assert model.config.moe_layers == moe_layers
    assert [index for index, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")] == moe_layers


def test_keys_that_real_checkpoints_hold_are_no_misspelt_fields():
    """Keys of published Qwen configurations, and of older Transformers releases, that are not fields any more."""
    legacy = {
        "architectures": ["Qwen2ForCausalLM"],
        "torch_dtype": "bfloat16",
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "sliding_window": 32768,
        "use_mrope": False,
        "seq_length": 8192,
        "top_k": 20,
        "max_length": 20,
        "pruned_heads": {},
        "tie_encoder_decoder": False,
        "sep_token_id": None,
    }
    config = UpcycledQwenMoeConfig.from_dict({**SHAPE, **legacy})

    assert config.rope_parameters["rope_theta"] == 1000000.0


def test_names_from_the_hub_become_local_when_saved_again():
    """Transformers writes the repository before each class; a saved folder must run the code that lies in it."""
    remote = {"AutoModel": "someone/else--modeling_upcycled_moe.UpcycledQwenMoeModel", "AutoOther": "theirs.Class"}
    config = UpcycledQwenMoeConfig(**SHAPE, auto_map=remote)

    assert config.auto_map["AutoModel"] == "modeling_upcycled_moe.UpcycledQwenMoeModel"
    assert config.auto_map["AutoOther"] == "theirs.Class"
