import copy
import typing

import naive_reference
import pytest
import torch
import torch.nn.functional as F

from modeling_upcycled_moe import (
    LinearRouter,
    UpcycledQwenMoeConfig,
    routers_upcycled_moe,
    selection_upcycled_moe,
)
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
    "mlp": {"router_type": "mlp"},
    "grouped average": {"router_type": "grouped_average"},
}
SELECTIONS = {
    "sigmoid": {"router_score_function": "sigmoid"},
    "grouped": {"router_selection": "grouped_top_k", "num_expert_groups": 2},
    "grouped sigmoid": {
        "router_selection": "grouped_top_k",
        "num_expert_groups": 2,
        "router_score_function": "sigmoid",
    },
    "prototypes": {"router_selection": "prototype_top_k", "num_expert_groups": 2},
    "prototypes, raw weights": {
        "router_selection": "prototype_top_k",
        "num_expert_groups": 2,
        "norm_topk_prob": False,
    },
    "sigmoid prototypes": {
        "router_selection": "prototype_top_k",
        "num_expert_groups": 2,
        "router_score_function": "sigmoid",
    },
    "top p": {"router_selection": "top_p", "router_top_p": 0.5, "num_experts_per_tok": 4},
    "at most two of top p": {"router_selection": "top_p", "router_top_p": 0.9, "norm_topk_prob": False},
    "biased": {"use_router_bias": True, "router_score_function": "sigmoid"},
    "biased groups": {"use_router_bias": True, "router_selection": "grouped_top_k", "num_expert_groups": 2},
    "expert choice in evaluation mode": {"router_selection": "expert_choice"},
    "experts without computation": {"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 2},
    "constant experts, top p": {
        "num_constant_experts": 1,
        "router_selection": "top_p",
        "router_top_p": 0.6,
        "num_experts_per_tok": 5,
    },
    "complement": {"shared_expert_intermediate_size": 24, "shared_expert_gating": "complement"},
}
BLOCKS = {
    **ROUTERS,
    **SELECTIONS,
    "weights not normalised": {"norm_topk_prob": False},
    "one expert a token": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "every expert": {"num_experts_per_tok": 4},
    "shared expert": {"shared_expert_intermediate_size": 24},
    "plain shared expert": {"shared_expert_intermediate_size": 24, "shared_expert_gating": "plain"},
}
FOLDABLE = {
    "sum, R = E": {"num_routers": 4},
    "sum, R < E": {"num_routers": 2},
    "one router": {"num_routers": 1},
    "linear": {"router_type": "linear"},
    "grouped average": {"router_type": "grouped_average"},
    "biased": {"use_router_bias": True, "router_selection": "grouped_top_k", "num_expert_groups": 2},
}


def random_bias_(block: UpcycledQwenMoeSparseMoeBlock) -> None:
    if block.config.use_router_bias:
        block.gate.selector.e_score_correction_bias.copy_(
            torch.randn_like(block.gate.selector.e_score_correction_bias) * 0.2
        )


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
    random_bias_(block)
    tokens = torch.randn(3, 7, 64, requires_grad=True)
    cotangent, score_cotangent = torch.randn(3, 7, 64), torch.randn(21, model.config.num_routed_experts)

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


@pytest.mark.parametrize("fields", {**ROUTERS, **SELECTIONS}.values(), ids={**ROUTERS, **SELECTIONS})
def test_a_router_returns_logits_weights_and_indices_of_the_best_experts(make_moe, fields):
    model = make_moe(num_hidden_layers=1, **fields)
    [block] = moe_blocks(model)
    random_bias_(block)
    bias = block.gate.selector.e_score_correction_bias if model.config.use_router_bias else None
    tokens = torch.randn(30, 64)

    logits, weights, indices = block.gate(tokens)

    for token in range(30):
        expected = naive_reference.select(logits[token], model.config, bias)
        num_empty = indices.shape[1] - len(expected)
        empty = model.config.num_routed_experts
        assert indices[token].tolist() == [expert for expert, _ in expected] + [empty] * num_empty
        expected_weights = torch.stack([weight for _, weight in expected])
        torch.testing.assert_close(weights[token], F.pad(expected_weights, (0, num_empty)))


def test_in_training_every_expert_chooses_its_best_tokens(make_moe):
    """Here each of 4 experts takes 21 · 2 / 4 = 10.5, so 11 tokens, and a token's weights sum to one if it has any."""
    [block] = moe_blocks(make_moe(num_hidden_layers=1, router_type="linear", router_selection="expert_choice"))
    tokens = torch.randn(21, 64)
    with torch.no_grad():
        block.gate.weight[:, 0] += 3.0  # some tokens are nobody's best
        logits, weights, indices = block.train().gate(tokens)
        output = block(tokens)

    scores = torch.stack([naive_reference.softmax(row) for row in logits])
    chosen = [sorted(range(21), key=lambda token: -scores[token, expert].item())[:11] for expert in range(4)]
    assert {len(experts) for experts in chosen} == {11}
    numbers = set()
    for token in range(21):
        experts = [expert for expert in range(4) if token in chosen[expert]]
        numbers.add(len(experts))
        assert indices[token].tolist() == [expert if expert in experts else 4 for expert in range(4)]
        expected = torch.zeros(64)
        total = sum(scores[token, expert] for expert in experts)
        for expert in experts:
            weight = scores[token, expert] / total
            torch.testing.assert_close(weights[token, expert], weight)
            expected = expected + weight * naive_reference.expert_output(block, tokens[token], expert, block.config)
        torch.testing.assert_close(output[token], expected, rtol=1e-4, atol=1e-5)
    assert len(numbers) > 1, "every token got as many experts, which token choice would give too"


def test_what_follows_a_token_matters_in_training_by_expert_choice_and_not_in_evaluation(make_moe, make_tokens):
    model = make_moe(router_selection="expert_choice", router_aux_loss_coef=0.0)
    tokens = make_tokens(1, 16)
    changed = tokens.clone()
    changed[0, 8:] = make_tokens(1, 8, seed=1)

    def first_half(tokens):
        with torch.no_grad():
            return model(tokens).logits[:, :8]

    torch.testing.assert_close(first_half(changed), first_half(tokens), rtol=0, atol=1e-5)
    model.train()
    assert (first_half(changed) - first_half(tokens)).abs().max() > 1e-3


def test_empty_slots_and_free_experts_cost_no_expert_computation(make_moe, monkeypatch):
    model = make_moe(num_hidden_layers=1, num_zero_experts=4, router_selection="top_p", router_top_p=0.3)
    [block] = moe_blocks(model)
    tokens = torch.randn(50, 64)
    _, _, indices = block.gate(tokens)
    rows = []
    experts = block.experts.forward
    monkeypatch.setattr(
        block.experts, "forward", lambda hidden, *routing: rows.append(len(hidden)) or experts(hidden, *routing)
    )

    block(tokens)

    num_filled = int((indices < 4).sum())
    assert rows == [num_filled]
    assert 0 < num_filled < 50


def test_a_batch_without_any_expert_computation_has_zeros_and_gradients(make_moe):
    [block] = moe_blocks(
        make_moe(num_hidden_layers=1, num_experts_per_tok=1, router_type="linear", num_zero_experts=1)
    )
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.weight[4] = 1.0
    tokens = torch.rand(5, 64, requires_grad=True)

    output = block(tokens)
    output.sum().backward()

    assert torch.equal(output, torch.zeros(5, 64))
    assert torch.equal(tokens.grad, torch.zeros(5, 64))
    # Where gradients are missing, DDP waits for them in vain.
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in block.experts.parameters())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_bias_moves_selections_and_no_weight(make_moe, mode):
    fields = {"num_hidden_layers": 1, "use_router_bias": True, "router_score_function": "sigmoid"}
    [block] = moe_blocks(make_moe(**fields))
    block.train(mode == "train")
    tokens = torch.randn(40, 64)
    before = block.gate(tokens)
    block.gate.selector.e_score_correction_bias[3] = 10.0

    logits, weights, indices = block.gate(tokens)

    assert (indices == 3).sum() == 40 > (before[2] == 3).sum()
    scores = logits.sigmoid().gather(-1, indices)
    torch.testing.assert_close(weights, scores / scores.sum(dim=-1, keepdim=True))
    assert not list(block.gate.selector.parameters())


def test_biases_move_towards_balance_by_their_rate(make_moe):
    model = make_moe(use_router_bias=True, router_bias_update_rate=0.25, mlp_only_layers=[1])
    loads = torch.tensor([[10, 0, 5, 5], [3, 3, 3, 3]])

    model.update_router_biases(loads)
    model.update_router_biases(loads)

    biases = [block.gate.selector.e_score_correction_bias.tolist() for block in moe_blocks(model)]
    assert biases == [[-0.5, 0.5, 0.0, 0.0], [0.0] * 4]
    with pytest.raises(ValueError, match="use_router_bias=True"):
        make_moe().update_router_biases(loads)


def test_biases_balance_a_layer_that_prefers_one_expert(make_moe):
    fields = {
        "num_hidden_layers": 1,
        "router_type": "linear",
        "use_router_bias": True,
        "router_bias_update_rate": 0.001,
    }
    [block] = moe_blocks(make_moe(**fields))
    tokens = torch.randn(400, 64) + 1.0
    with torch.no_grad():
        block.gate.weight.mul_(0.2)[2] += 0.05

    def loads():
        return torch.bincount(block.gate(tokens)[2].flatten(), minlength=4)

    before = loads()
    for _ in range(400):
        block.gate.selector.update_bias(loads())

    assert before.max() > 300
    assert loads().max() < 230  # 200 if balanced


@pytest.mark.parametrize("convert", [torch.nn.Module.bfloat16, torch.nn.Module.half, lambda model: model.to("meta")])
def test_biases_stay_in_float32_when_the_model_is_converted(make_moe, convert):
    model = make_moe(use_router_bias=True)
    model.update_router_biases(torch.arange(12).view(3, 4))

    convert(model)

    for block in moe_blocks(model):
        bias = block.gate.selector.e_score_correction_bias
        assert bias.dtype == torch.float32
        assert bias.device == block.gate.keys.device
        assert bias.is_meta or bias.tolist() == pytest.approx([0.001, 0.001, -0.001, -0.001])
        assert "selector.e_score_correction_bias" in block.gate.state_dict()


def test_biases_stay_in_float32_and_are_saved(make_moe, tmp_path):
    model = make_moe(use_router_bias=True)
    model.update_router_biases(torch.arange(12).view(3, 4))
    model.save_pretrained(tmp_path)

    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)

    for block, original in zip(moe_blocks(loaded), moe_blocks(model), strict=True):
        assert block.experts.down_proj.dtype == torch.bfloat16
        assert block.gate.selector.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(block.gate.selector.e_score_correction_bias, original.gate.selector.e_score_correction_bias)


@pytest.mark.parametrize("scale", [1e-3, 100.0, 1000.0])
@pytest.mark.parametrize("fields", SELECTIONS.values(), ids=SELECTIONS)
def test_weights_of_logits_of_any_size_are_finite_gradients_included(make_moe, fields, scale):
    [block] = moe_blocks(make_moe(num_hidden_layers=1, **fields))
    logits = (torch.randn(50, block.config.num_routed_experts) * scale).requires_grad_()

    weights, _ = block.gate.selector(logits)
    (weights * torch.randn_like(weights)).sum().backward()

    assert weights.isfinite().all()
    assert logits.grad.isfinite().all()
    if block.config.norm_topk_prob and block.config.shared_expert_gating != "complement":
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(50))


def test_sigmoid_scores_that_round_to_one_still_have_an_order(make_moe):
    [block] = moe_blocks(make_moe(num_hidden_layers=1, router_score_function="sigmoid"))

    _, index = block.gate.selector(torch.tensor([[30.0, 40.0, 50.0, 60.0], [300.0, 500.0, 400.0, 200.0]]))

    assert index.tolist() == [[3, 2], [1, 2]]


CONSTANT = {
    "one expert": {"num_experts_per_tok": 1},
    "one expert a group": {"router_selection": "prototype_top_k", "num_expert_groups": 2},
}
NOT_CONSTANT = {
    "two experts": {},
    "one expert, raw weight": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "one expert of each group": {"router_selection": "grouped_top_k", "num_expert_groups": 2},
    "one expert beside a shared one": {
        "num_experts_per_tok": 1,
        "shared_expert_intermediate_size": 24,
        "shared_expert_gating": "complement",
    },
    "one expert by choice": {"num_experts_per_tok": 1, "router_selection": "expert_choice"},
}


@pytest.mark.parametrize("fields", {**CONSTANT, **NOT_CONSTANT}.values(), ids={**CONSTANT, **NOT_CONSTANT})
def test_the_language_modeling_loss_reaches_the_router_unless_its_weights_are_constant(make_moe, make_tokens, fields):
    model = make_moe(router_aux_loss_coef=0.0, **fields).train()
    tokens = make_tokens()

    model(tokens, labels=tokens).loss.backward()

    largest = max(block.gate.keys.grad.abs().max().item() for block in moe_blocks(model))
    assert model.config.has_constant_weights == (fields in CONSTANT.values())
    assert (largest < 1e-6) == model.config.has_constant_weights


def test_every_selection_of_the_configuration_has_a_function():
    assert set(typing.get_args(UpcycledQwenMoeConfig.__dataclass_fields__["router_selection"].type)) == set(
        selection_upcycled_moe.SELECTIONS
    )
    assert set(typing.get_args(UpcycledQwenMoeConfig.__dataclass_fields__["router_type"].type)) == set(
        routers_upcycled_moe.ROUTERS
    )


TRAINABLE = {**ROUTERS, **SELECTIONS, "expert choice": {"router_selection": "expert_choice"}}


@pytest.mark.parametrize("fields", TRAINABLE.values(), ids=TRAINABLE)
def test_every_router_trains_saves_and_loads_the_same(make_moe, make_tokens, tmp_path, fields):
    model = make_moe(num_hidden_layers=2, **fields).train()
    tokens = make_tokens(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        outputs = model(tokens, labels=tokens, output_router_logits=True)
        losses.append(outputs.loss.item())
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path)

    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)

    assert not any(report.values())
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    generated = loaded.generate(tokens[:, :8], max_new_tokens=4, do_sample=False)
    continued = torch.stack([loaded(generated[:, :length]).logits[:, -1].argmax(-1) for length in range(8, 12)], dim=1)
    assert torch.equal(generated[:, 8:], continued), "with a cache a token must get the experts that it gets without"


def test_jitter_scales_the_input_of_the_router_in_training_only(make_moe):
    [block] = moe_blocks(make_moe(num_hidden_layers=1, router_type="linear", router_jitter_noise=0.25))
    with torch.no_grad():
        block.gate.weight.copy_(torch.eye(4, 64))
    tokens = torch.ones(500, 64)

    torch.testing.assert_close(block.gate(tokens)[0], torch.ones(500, 4))
    noise = block.train().gate(tokens)[0]
    assert 0.75 <= noise.min() < 0.77
    assert 1.23 < noise.max() <= 1.25


@pytest.mark.parametrize("fields", FOLDABLE.values(), ids=FOLDABLE)
def test_folding_changes_no_logit_and_goes_on_recording(make_moe, make_tokens, fields):
    model = make_moe(mlp_only_layers=[1], **fields)
    for block in moe_blocks(model):
        random_bias_(block)
    before = model(make_tokens(), output_router_logits=True)

    assert model.fold_routers() is model
    after = model(make_tokens(), output_router_logits=True)

    assert model.config.router_type == "linear"
    assert [type(block.gate) for block in moe_blocks(model)] == [LinearRouter] * 2
    assert len(after.router_logits) == 2
    torch.testing.assert_close(after.router_logits, before.router_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=5e-6)


def test_folding_freezes_and_thaws_nothing(make_moe):
    for fields, trains in (({}, True), ({"router_type": "grouped_average"}, False)):
        model = make_moe(**fields).fold_routers()
        assert [block.gate.weight.requires_grad for block in moe_blocks(model)] == [trains] * 3


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
        ({"num_routers": 8}, "num_router_keys=8 for 4 experts does not fold"),
        ({"router_type": "mlp"}, "router_type='mlp' does not fold"),
    ],
    ids=["max", "several keys", "mlp"],
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
