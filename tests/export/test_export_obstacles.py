"""Nothing lossy is written: each thing that an architecture cannot hold is named, alone."""

import pytest
import torch

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.streaming.stored import StoredTensor
from upcycled_moe.export.export import plan_export
from upcycled_moe.export.obstacles import choose_target, nonzero_attention_biases, target_obstacles
from upcycled_moe.export.targets import TARGETS


QWEN2, QWEN3 = {"base_model_type": "qwen2"}, {"base_model_type": "qwen3"}
SOME_WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
SHARED = {"shared_expert_intermediate_size": 24}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router_type": "mlp"}, r"its GELU is not linear in the token"),
        ({"router_pooling": "max"}, r"the maximum over routers is not linear"),
        ({"num_router_keys": 8}, r"the best of several keys is not linear"),
        ({"router_score_function": "sigmoid"}, r"router_score_function='sigmoid', not softmax"),
        ({"router_selection": "top_p", "router_top_p": 0.5}, r"router_selection='top_p', not top_k"),
        ({"router_selection": "grouped_top_k", "num_expert_groups": 2}, r"router_selection='grouped_top_k'"),
        ({"router_selection": "prototype_top_k", "num_expert_groups": 2}, r"router_selection='prototype_top_k'"),
        ({"num_zero_experts": 1}, r"1 of its experts are without computation"),
        ({"num_copy_experts": 1, "num_constant_experts": 1}, r"2 of its experts are without computation"),
        ({**SHARED, "shared_expert_gating": "complement"}, r"shared_expert_gating='complement'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("to", ["auto", "qwen2_moe"])
def test_what_no_architecture_has(fields, message, to, write_moe):
    source = write_moe(**fields)
    with pytest.raises(SettingsError, match=message) as error:
        plan_export(source, to, max_shard_bytes=10**9)
    assert "no stock architecture computes what this model does" in str(error.value)
    assert "; serve it with its own code" in str(error.value)
    # One thing stands in the way, and one is named.
    assert ", and " not in str(error.value)


def test_router_biases_that_are_not_zero(write_moe):
    source = write_moe(use_router_bias=True)
    bias = source.tensors["model.layers.2.mlp.gate.selector.e_score_correction_bias"]
    with bias.path.open("r+b") as file:
        file.seek(bias.offset)
        file.write(torch.tensor([0.5]).numpy().tobytes())
    with pytest.raises(SettingsError, match=r"biases .* \(use_router_bias\) are not zero"):
        choose_target(source, "auto")


@pytest.mark.parametrize(
    ("to", "arguments", "messages"),
    [
        ("qwen2_moe", QWEN3, ["it has no q/k norms"]),
        ("mixtral", {**QWEN3, "attention_bias": False}, ["it has no q/k norms"]),
        ("qwen3_moe", QWEN2, ["it normalises queries and keys"]),
        (
            "qwen2_moe",
            {**QWEN3, "attention_bias": True},
            ["it has no q/k norms", "it has no attention bias on o_proj"],
        ),
        ("mixtral", QWEN2, ["it has no attention bias on k_proj, q_proj, v_proj"]),
        ("qwen3_moe", {**QWEN3, **SOME_WINDOWS}, ["its sliding window is one for all layers, and here 1 of 3"]),
        ("mixtral", {"zero_biases": True, **SOME_WINDOWS}, ["its sliding window is one for all layers"]),
        ("mixtral", {"zero_biases": True, "mlp_only_layers": [1]}, ["all its layers have experts, and here 1 of 3"]),
        ("mixtral", {"zero_biases": True, "norm_topk_prob": False}, ["it scales the weights"]),
        ("mixtral", {"zero_biases": True, **SHARED}, ["it has no shared expert, here 24 wide"]),
        ("qwen3_moe", {**QWEN3, **SHARED}, ["it has no shared expert, here 24 wide"]),
    ],
)
def test_what_one_architecture_does_not_have(to, arguments, messages, write_moe):
    source = write_moe(**arguments)
    biases = nonzero_attention_biases(source)
    obstacles = target_obstacles(source.config, TARGETS[to], biases)
    assert len(obstacles) == len(messages)
    for obstacle, message in zip(obstacles, messages, strict=True):
        assert obstacle.startswith(message)
    exact = [name for name in TARGETS if not target_obstacles(source.config, TARGETS[name], biases)]
    way_out = f"does not fit {to}: .*; give --to {exact[0]}" if exact else "no stock architecture .*; serve it with"
    with pytest.raises(SettingsError, match=way_out):
        plan_export(source, to, max_shard_bytes=10**9)


def test_auto_says_what_each_architecture_would_lose(write_moe):
    source = write_moe(**QWEN3, **SHARED)
    with pytest.raises(SettingsError) as error:
        plan_export(source, "auto", max_shard_bytes=10**9)
    message = str(error.value)
    assert message.startswith(f"{source.name}: no stock architecture computes what this model does: qwen3_moe: it has")
    assert "; qwen2_moe: it has no q/k norms" in message
    assert "; mixtral: it has no q/k norms" in message
    assert "`upcycled-moe merge`" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "target", "rejected"),
    [
        (QWEN3, "qwen3_moe", set()),
        (QWEN2, "qwen2_moe", {"qwen3_moe"}),
        ({**QWEN2, **SHARED}, "qwen2_moe", {"qwen3_moe"}),
    ],
)
def test_auto_takes_the_first_that_is_exact_and_says_why(arguments, target, rejected, write_moe):
    choice = choose_target(write_moe(**arguments), "auto")
    assert choice.target is TARGETS[target]
    assert choice.reason.startswith("the first of qwen3_moe, qwen2_moe, mixtral")
    assert choice.rejected.keys() == rejected
    assert all(choice.rejected.values())


def test_an_unknown_architecture_is_refused(write_moe):
    with pytest.raises(SettingsError, match=r"to='olmoe' .* allowed: qwen3_moe, qwen2_moe, mixtral, auto"):
        choose_target(write_moe(), "olmoe")


def test_a_refusal_reads_no_large_tensor(write_moe, monkeypatch):
    source, read, load = write_moe(**QWEN2), set(), StoredTensor.load
    monkeypatch.setattr(StoredTensor, "load", lambda tensor: read.add(tensor.name) or load(tensor))
    with pytest.raises(SettingsError):
        plan_export(source, "mixtral", max_shard_bytes=10**9)
    assert not [name for name in read if ".mlp.gate." not in name and not name.endswith("_proj.bias")]
