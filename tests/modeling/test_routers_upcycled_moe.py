import copy

import naive_reference
import pytest
import torch

from modeling_upcycled_moe import LinearRouter
from modeling_upcycled_moe.modeling_upcycled_moe import UpcycledQwenMoeSparseMoeBlock


# As in the paper's Table 3: as many routers as experts, fewer (their heads repeat), more (several keys an expert).
ROUTERS = {
    "linear": {"router_type": "linear"},
    "sum, R = E": {"num_routers": 4},
    "sum, R < E": {"num_routers": 2},
    "sum, R > E": {"num_routers": 12},
    "max, R = E": {"num_routers": 4, "router_pooling": "max"},
    "max, R < E": {"num_routers": 2, "router_pooling": "max"},
    "max, R > E": {"num_routers": 12, "router_pooling": "max"},
    "three keys an expert, one router": {"num_routers": 1, "num_router_keys": 12},
}
BLOCKS = {
    **ROUTERS,
    "weights not normalised": {"norm_topk_prob": False},
    "one expert a token": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "every expert": {"num_experts_per_tok": 4},
    "shared expert": {"shared_expert_intermediate_size": 24},
}
FOLDABLE = {"sum, R = E": 4, "sum, R < E": 2, "one router": 1}


def moe_blocks(model) -> list[UpcycledQwenMoeSparseMoeBlock]:
    return [module for module in model.modules() if isinstance(module, UpcycledQwenMoeSparseMoeBlock)]


def gradients(module: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("fields", BLOCKS.values(), ids=BLOCKS)
def test_a_block_equals_the_formulas_token_by_token_gradients_included(make_moe, fields):
    model = make_moe(num_hidden_layers=1, **fields)
    [block] = moe_blocks(model)
    tokens = torch.randn(3, 7, 64, requires_grad=True)
    cotangent, score_cotangent = torch.randn(3, 7, 64), torch.randn(21, 4)

    scores = []
    hook = block.gate.register_forward_hook(lambda _module, _arguments, output: scores.append(output[0]))
    output = block(tokens)
    hook.remove()
    fast = gradients(block, (output * cotangent).sum() + (scores[0] * score_cotangent).sum())
    fast_input, tokens.grad = tokens.grad, None

    naive = [naive_reference.moe_block(block, token, model.config) for token in tokens.reshape(21, 64)]
    naive_output = torch.stack([token_output for token_output, _ in naive])
    naive_scores = torch.stack([token_scores for _, token_scores in naive])
    slow = gradients(block, (naive_output * cotangent.view(21, 64)).sum() + (naive_scores * score_cotangent).sum())

    torch.testing.assert_close(scores[0], naive_scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.view(21, 64), naive_output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fast_input, tokens.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fields", ROUTERS.values(), ids=ROUTERS)
def test_a_router_returns_logits_weights_and_indices_of_the_best_experts(make_moe, fields):
    model = make_moe(num_hidden_layers=1, **fields)
    [block] = moe_blocks(model)
    tokens = torch.randn(30, 64)

    logits, weights, indices = block.gate(tokens)

    for token in range(30):
        expected = naive_reference.select(logits[token], top_k=2, norm_topk_prob=True)
        assert indices[token].tolist() == [expert for expert, _ in expected]
        torch.testing.assert_close(weights[token], torch.stack([weight for _, weight in expected]))


def test_jitter_scales_the_input_of_the_router_in_training_only(make_moe):
    [block] = moe_blocks(make_moe(num_hidden_layers=1, router_type="linear", router_jitter_noise=0.25))
    with torch.no_grad():
        block.gate.weight.copy_(torch.eye(4, 64))
    tokens = torch.ones(500, 64)

    torch.testing.assert_close(block.gate(tokens)[0], torch.ones(500, 4))
    noise = block.train().gate(tokens)[0]
    assert 0.75 <= noise.min() < 0.77
    assert 1.23 < noise.max() <= 1.25


@pytest.mark.parametrize("num_routers", FOLDABLE.values(), ids=FOLDABLE)
def test_folding_changes_no_logit_and_goes_on_recording(make_moe, make_tokens, num_routers):
    model = make_moe(num_routers=num_routers, mlp_only_layers=[1])
    before = model(make_tokens(), output_router_logits=True)

    assert model.fold_routers() is model
    after = model(make_tokens(), output_router_logits=True)

    assert model.config.router_type == "linear"
    assert [type(block.gate) for block in moe_blocks(model)] == [LinearRouter] * 2
    assert len(after.router_logits) == 2
    torch.testing.assert_close(after.router_logits, before.router_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=5e-6)


def test_a_folded_model_saves_and_loads_as_one_with_a_linear_router(make_moe, make_tokens, tmp_path):
    model = make_moe().fold_routers()
    model.save_pretrained(tmp_path)

    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)

    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(loaded(make_tokens()).logits, model(make_tokens()).logits)


def test_bfloat16_weights_fold_with_one_rounding_only(make_moe):
    """Folding in bfloat16 would round at each of three steps; near-ties between experts then flip."""
    model = make_moe(num_hidden_layers=1, num_routers=4).bfloat16()
    gate = moe_blocks(model)[0].gate
    exact = gate.keys.double() @ gate.query_weight.double().sum(dim=0)

    model.fold_routers()

    weight = moe_blocks(model)[0].gate.weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, exact.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"router_pooling": "max"}, "router_pooling='max' does not fold"),
        ({"num_routers": 8}, "num_router_keys=8 with num_experts=4 does not fold"),
    ],
    ids=["max", "several keys"],
)
def test_what_does_not_fold_is_refused_and_left_as_it_was(make_moe, make_tokens, fields, reason):
    model = make_moe(**fields)
    config, weights = copy.deepcopy(model.config), copy.deepcopy(model.state_dict())
    logits = model(make_tokens()).logits

    with pytest.raises(ValueError, match=reason):
        model.fold_routers()

    assert model.config.to_dict() == config.to_dict()
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert torch.equal(model(make_tokens()).logits, logits)
