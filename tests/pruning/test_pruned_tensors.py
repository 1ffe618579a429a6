"""The written checkpoint is the model that is sliced by hand."""

import pytest
import torch
from moe_checkpoints import make_model

from upcycled_moe.common.checkpoints import load_config, load_model
from upcycled_moe.common.derived_checkpoint import DerivedCheckpoint, written
from upcycled_moe.common.moe_source import open_moe
from upcycled_moe.common.progress import Progress
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.streaming.planned import into_shards
from upcycled_moe.pruning.tensors import PrunedLayer, pruned_config, pruned_tensors


KEPT = {0: [1, 3], 1: [0, 2], 2: [2, 3]}
MIXTURE = {"router_type": "mixture", "num_routers": 4, "router_head_dim": 8}
FREE = {"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 1}
MODELS = {
    "linear": {"router_type": "linear"},
    "mixture": MIXTURE,
    "several keys": {**MIXTURE, "num_router_keys": 12, "router_pooling": "max"},
    "mlp": {"router_type": "mlp"},
    "free experts": {**MIXTURE, **FREE},
    "several keys and free experts": {
        **MIXTURE,
        **FREE,
        "num_router_keys": 14,
        "expert_nodes": [0, 0, 1, 1] + [0] * 3,
    },
    "bias": {"router_type": "mlp", "use_router_bias": True, **FREE},
    "shared": {"router_type": "linear", "shared_expert_intermediate_size": 16, "tie_word_embeddings": True},
    "groups": {"router_type": "linear", "router_selection": "grouped_top_k", "num_expert_groups": 2},
    "dense layers": {"router_type": "linear", "mlp_only_layers": [0]},
}
# By the parts of each kind.
KEPT_OF_PARTS = {0: [1, 3], 1: [0, 2], 2: [1, 2]}


def _sliced_by_hand(state, config, kept_by_layer):
    sliced = dict(state)
    num_free = config.num_routed_experts - config.num_experts
    for layer_idx in config.moe_layers:
        kept = kept_by_layer[layer_idx]
        routed = kept + [config.num_experts + number for number in range(num_free)]
        prefix = f"model.layers.{layer_idx}.mlp."
        for name in ("experts.gate_up_proj", "experts.down_proj"):
            sliced[prefix + name] = state[prefix + name][kept]
        for name in ("weight", "down_weight", "selector.e_score_correction_bias"):
            if prefix + "gate." + name in state:
                sliced[f"{prefix}gate.{name}"] = state[f"{prefix}gate.{name}"][routed]
        if prefix + "gate.keys" in state:
            keys = state[prefix + "gate.keys"].unflatten(0, (config.num_routed_experts, -1))
            sliced[prefix + "gate.keys"] = keys[routed].flatten(0, 1)
    return sliced


def _write(model, kept, folder, num_experts_per_tok=None, max_shard_bytes=10**9):
    model.save_pretrained(folder / "original")
    source = open_moe(str(folder / "original"))
    config = pruned_config(source.config, 2, num_experts_per_tok)
    layers = {layer_idx: PrunedLayer(kept[layer_idx]) for layer_idx in config.moe_layers}
    shards = into_shards(pruned_tensors(source, config, layers), max_shard_bytes)
    derived = DerivedCheckpoint(source, config, shards)
    with written(derived, folder / "out", False, Progress()):
        pass
    return load_model(str(folder / "out"), config, dtype="auto", device="cpu", own_code=False), derived


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_sliced_by_hand(tmp_path, name):
    model = make_model("linear", **MODELS[name])
    generator = torch.Generator().manual_seed(0)
    for buffer in model.buffers():
        if buffer.shape == (model.config.num_routed_experts,):
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    kept = KEPT_OF_PARTS if {"num_expert_groups", "expert_nodes"} & MODELS[name].keys() else KEPT
    pruned, derived = _write(model, kept, tmp_path)
    expected = _sliced_by_hand(model.state_dict(), model.config, kept)
    assert pruned.state_dict().keys() == expected.keys()
    for key, value in pruned.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert pruned.config.num_experts == 2
    assert derived.total_parameters == sum(parameter.numel() for parameter in pruned.parameters())
    if "expert_nodes" in MODELS[name]:
        assert pruned.config.expert_nodes == [0, 1] + [0] * 3
    with torch.no_grad():
        assert pruned(torch.arange(3, 20)[None]).logits.isfinite().all()


def test_a_router_without_weights_becomes_a_linear_one_with_the_same_logits(tmp_path):
    model = make_model("linear", router_type="grouped_average", num_zero_experts=4)
    pruned, _ = _write(model, KEPT, tmp_path)
    assert pruned.config.router_type == "linear"
    tokens = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer_idx in model.config.moe_layers:
            logits = model.model.layers[layer_idx].mlp.gate(tokens)[0][:, [*KEPT[layer_idx], 4, 5, 6, 7]]
            found = pruned.model.layers[layer_idx].mlp.gate(tokens)[0]
            torch.testing.assert_close(found, logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("router_dtype", [None, "float32"])
def test_bfloat16_in_shards_loads_by_the_code_beside_it(tmp_path, router_dtype):
    model = make_model("linear", router_type="mixture", router_dtype=router_dtype).bfloat16()
    pruned, derived = _write(model, KEPT, tmp_path, max_shard_bytes=20_000)
    assert len(derived.shards) > 2
    out = str(tmp_path / "out")
    loaded = load_model(out, load_config(out), dtype="auto", device="cpu")
    assert type(loaded).__module__.startswith("transformers_modules")
    for key, value in _sliced_by_hand(model.state_dict(), model.config, KEPT).items():
        assert torch.equal(loaded.state_dict()[key].bfloat16(), value), key
        assert torch.equal(pruned.state_dict()[key].bfloat16(), value), key


@pytest.mark.parametrize(
    ("fields", "num_experts", "num_experts_per_tok", "message"),
    [
        ({"num_experts_per_tok": 3}, 2, None, r"num_experts_per_tok=3 exceeds the 2 experts .*--num-experts-per-tok"),
        ({}, 3, 3, "num_experts_per_tok=3 exceeds the 2 of the checkpoint"),
        (
            {"router_selection": "grouped_top_k", "num_expert_groups": 2},
            2,
            1,
            "num_experts_per_tok=1 is not a multiple of num_expert_groups=2",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_errors(fields, num_experts, num_experts_per_tok, message):
    config = make_model("linear", **fields).config
    with pytest.raises(SettingsError, match=message):
        pruned_config(config, num_experts, num_experts_per_tok)


def test_fewer_experts_of_a_token_can_be_asked_for(tmp_path):
    pruned, _ = _write(make_model("linear", num_experts_per_tok=3), KEPT, tmp_path, num_experts_per_tok=1)
    assert pruned.config.num_experts_per_tok == 1
