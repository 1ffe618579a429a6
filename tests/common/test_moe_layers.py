"""MoE layers of our models and of stock ones: found, observed, and computed expert by expert."""

from contextlib import nullcontext

import pytest
import torch
from moe_checkpoints import KINDS, SHAPE, make_model
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from upcycled_moe.common.moe_layers import RoutedTokens, check_routing, find_moe_layers, observed
from upcycled_moe.common.routing_pass import run_pass
from upcycled_moe.common.settings import SettingsError


TOKENS = torch.arange(60).view(2, 30) * 5 % 320


class _Seen:
    """Keeps what one forward pass shows, by MoE layer."""

    def __init__(self, model):
        self.layers = find_moe_layers(model)
        self.routing = {}
        with torch.inference_mode(), observed(self.layers, self):
            self.output = model.base_model(TOKENS, use_cache=False)

    def __call__(self, number, *routing):
        assert number not in self.routing
        self.routing[number] = routing


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_are_found_with_their_numbers(kind):
    model = make_model(kind)
    layers = find_moe_layers(model)
    assert [layer.index for layer in layers] == ([1, 2] if kind == "mixture" else [0, 1, 2])
    assert layers[0].num_computed_experts == 4
    assert layers[0].num_experts == (6 if kind == "zero experts" else 4)
    assert layers[0].num_experts_per_tok == (3 if kind == "top-p" else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_observed_is_what_the_model_says_of_itself(kind):
    model = make_model(kind)
    seen = _Seen(model)
    if kind == "classifier":
        said = model(TOKENS, output_router_logits=True).router_logits
    else:
        said = model(TOKENS, output_router_logits=True, use_cache=False).router_logits
    assert sorted(seen.routing) == list(range(len(said)))
    for number, (hidden_states, router_logits, weights, selected) in seen.routing.items():
        assert hidden_states.shape == (60, 32)
        assert weights.shape == selected.shape == (60, seen.layers[number].num_experts_per_tok)
        torch.testing.assert_close(router_logits, said[number])


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_expert_outputs_add_up_to_the_output_of_the_block(kind):
    model = make_model(kind)
    layer, block = find_moe_layers(model)[0], None
    for module in model.modules():
        if getattr(module, "gate", None) is layer.gate:
            block = module
    tokens = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = block(tokens[None])[0]
        _, weights, selected = layer.gate(tokens)
        found = torch.zeros_like(tokens)
        for expert, output in enumerate(layer.expert_outputs(tokens)):
            # An empty slot, and an expert without computation, have numbers above.
            found += (weights * (selected == expert)).sum(dim=-1, keepdim=True) * output
        if getattr(block, "shared_expert", None) is not None:
            found += block.shared_expert_gate(tokens).sigmoid() * block.shared_expert(tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if kind == "top-p":
        assert (selected == 4).any()
    if kind == "zero experts":
        assert (selected >= 4).any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_scores_sum_to_one_and_explain_the_weights(kind):
    seen = _Seen(make_model(kind))
    for number, (_, router_logits, weights, selected) in seen.routing.items():
        layer = seen.layers[number]
        probabilities = layer.log_probabilities(router_logits).exp()
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(60))
        chosen = torch.nn.functional.pad(probabilities, (0, 1)).gather(-1, selected)
        if layer.config.to_dict().get("norm_topk_prob", True):
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(weights, chosen)


def test_nothing_is_observed_afterwards():
    model = make_model("linear")
    layers, calls = find_moe_layers(model), []
    with observed(layers, lambda *routing: calls.append(routing)):
        model(TOKENS)
    assert len(calls) == 3
    model(TOKENS)
    assert len(calls) == 3


def test_a_dense_model_has_no_layer_to_look_into():
    model = Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "num_hidden_layers": 1}))
    with pytest.raises(
        SettingsError, match="qwen2 models have no MoE layer that can be looked into; give an upcycled"
    ):
        find_moe_layers(model)


def _routed(layer, router_logits, weights, selected):
    return RoutedTokens(0, None, None, None, router_logits, layer.log_probabilities(router_logits), weights, selected)


def test_weights_that_are_no_softmax_of_the_logits_are_refused():
    layer = find_moe_layers(make_model("mixtral"))[0]
    router_logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    scores, selected = router_logits.topk(2)
    check_routing(layer, _routed(layer, router_logits, scores.softmax(-1), selected))
    check_routing(layer, _routed(layer, router_logits, router_logits.softmax(-1).gather(-1, selected), selected))
    with pytest.raises(
        SettingsError, match="mixtral models do not weight experts by the softmax of their router logits"
    ):
        check_routing(layer, _routed(layer, router_logits, scores.sigmoid(), selected))


@pytest.mark.parametrize(
    "outputs",
    [
        lambda logits, weights, selected: (weights, selected),
        lambda logits, weights, selected: logits,
        lambda logits, weights, selected: (logits, logits, selected),
        lambda logits, weights, selected: (weights, weights, selected),
    ],
)
def test_a_router_that_returns_something_else_is_refused(outputs):
    model = make_model("qwen3_moe")
    layers = find_moe_layers(model)
    layers[0].gate.register_forward_hook(lambda module, inputs, given: outputs(*given))
    with (
        pytest.raises(
            SettingsError,
            match="the routers of qwen3_moe models return something else than logits, weights and experts",
        ),
        observed(layers, lambda *routing: None),
    ):
        model.base_model(TOKENS)


# Sigmoid scores; no layer of the known form; softmax as in the known ones.
@pytest.mark.parametrize(
    ("model_type", "message"),
    [("glm4_moe", "do not weight experts"), ("gpt_oss", "no MoE layer"), ("ernie4_5_moe", "")],
)
def test_other_architectures_give_no_figures_of_what_they_do_not_compute(model_type, message):
    fields = {
        "n_routed_experts": 4,
        "num_local_experts": 4,
        "moe_num_experts": 4,
        "moe_k": 2,
        "first_k_dense_replace": 0,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SHAPE, **fields})).eval()
    block = {"input_ids": list(range(30)), "position_ids": list(range(30))}
    with pytest.raises(SettingsError, match=message) if message else nullcontext():
        run_pass(model, find_moe_layers(model), {"text": [block]}, [], 1)
