import math
import pickle

import naive_reference
import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from modeling_upcycled_moe import UpcycledQwenMoeConfig
from modeling_upcycled_moe.losses_upcycled_moe import (
    load_balancing_losses,
    locality_losses,
    router_entropy_losses,
    router_losses,
)
from modeling_upcycled_moe.selection_upcycled_moe import SELECTIONS, log_scores, routing_log_probabilities


LEFT_PADDED = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
RIGHT_PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
MASKS = {"no mask": None, "no padding": torch.ones(2, 6, dtype=torch.long), "left": LEFT_PADDED, "right": RIGHT_PADDED}


def collapsed_onto(experts: list[int], num_tokens: int = 10, num_experts: int = 4) -> torch.Tensor:
    """Return router logits [T, E] of a layer that sends every token to the same experts."""
    logits = torch.zeros(num_tokens, num_experts)
    logits[:, experts] = 20.0
    return logits


def config_of(num_experts: int = 4, **fields) -> UpcycledQwenMoeConfig:
    return UpcycledQwenMoeConfig(router_type="linear", num_experts=num_experts, **fields)


def losses_of(router_logits, config, attention_mask=None, node=0) -> dict[str, torch.Tensor]:
    """Return the losses of routers that select what `config` says of `router_logits`."""
    select = SELECTIONS[config.router_selection].select
    selected = tuple(select(log_scores(logits, config), config) for logits in router_logits)
    return router_losses(config, router_logits, selected, attention_mask, node)


SELECTED = {
    "top k": {},
    "sigmoid": {"router_score_function": "sigmoid"},
    "prototypes": {"router_selection": "prototype_top_k", "num_expert_groups": 2},
    "top p": {"router_selection": "top_p", "router_top_p": 0.6, "num_experts_per_tok": 4},
}


@pytest.mark.parametrize("fields", SELECTED.values(), ids=SELECTED)
@pytest.mark.parametrize("attention_mask", MASKS.values(), ids=MASKS)
def test_each_layer_s_losses_equal_the_formulas_gradients_included(attention_mask, fields):
    config = config_of(6, **fields)
    router_logits = tuple(torch.randn(12, 6, requires_grad=True) for _ in range(3))
    is_token = [True] * 12 if attention_mask is None else attention_mask.flatten().bool().tolist()
    layer_weights = torch.tensor([1.0, -2.0, 0.5])

    losses = losses_of(router_logits, config, attention_mask)
    fast = torch.autograd.grad(layer_weights @ (losses["aux_loss"] + losses["z_loss"]), router_logits)

    naive_balance = torch.stack([naive_reference.balance_loss(logits, config, is_token) for logits in router_logits])
    parts = config.num_expert_groups or 1
    naive_z = torch.stack(
        [
            sum(naive_reference.z_loss(part, is_token) for part in logits.chunk(parts, dim=-1)) / parts
            for logits in router_logits
        ]
    )
    slow = torch.autograd.grad(layer_weights @ (naive_balance + naive_z), router_logits)

    assert losses.keys() == {"aux_loss", "z_loss"}
    torch.testing.assert_close(losses["aux_loss"], naive_balance)
    torch.testing.assert_close(losses["z_loss"], naive_z)
    torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("attention_mask", MASKS.values(), ids=MASKS)
def test_entropy_and_locality_equal_the_formulas(attention_mask):
    config = config_of(5, router_entropy_loss_coef=0.1, router_locality_loss_coef=0.1, expert_nodes=[0, 1, 1, 2, 0])
    router_logits = tuple(torch.randn(12, 5) for _ in range(2))
    is_token = [True] * 12 if attention_mask is None else attention_mask.flatten().bool().tolist()

    losses = losses_of(router_logits, config, attention_mask, node=1)

    for layer, logits in enumerate(router_logits):
        rows = [naive_reference.softmax(row) for row, counts in zip(logits, is_token, strict=True) if counts]
        entropy = sum(-sum(p * torch.log(p) for p in row) for row in rows) / len(rows)
        stays = sum(row[1] + row[2] for row in rows) / len(rows)
        torch.testing.assert_close(losses["entropy_loss"][layer], entropy)
        torch.testing.assert_close(losses["locality_loss"][layer], -torch.log(stays))


def test_entropy_is_least_for_sure_and_locality_for_staying_tokens():
    log_probabilities = tuple(layer.log_softmax(-1) for layer in (torch.eye(4) * 1000, torch.zeros(4, 4)))

    torch.testing.assert_close(router_entropy_losses(log_probabilities), torch.tensor([0.0, math.log(4)]))
    stays, leaves = (torch.eye(4)[[0, 1]],), (torch.eye(4)[[2, 3]],)
    assert locality_losses(stays, [0, 0, 1, 1], 0).item() == 0
    assert locality_losses(leaves, [0, 0, 1, 1], 0).item() > 80
    with pytest.raises(ValueError, match="no expert on node 2"):
        locality_losses(stays, [0, 0, 1, 1], 2)


@pytest.mark.parametrize("fields", SELECTED.values(), ids=SELECTED)
def test_probabilities_sum_to_one(fields):
    probabilities = routing_log_probabilities(torch.randn(9, 6), config_of(6, **fields)).exp()

    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(9))


@pytest.mark.parametrize("scale", [100.0, 1000.0, -1000.0])
@pytest.mark.parametrize("fields", SELECTED.values(), ids=SELECTED)
def test_losses_and_gradients_of_large_logits_are_finite(fields, scale):
    """Raw scores of a mixture have a standard deviation of up to 130."""
    coefficients = {"router_entropy_loss_coef": 0.1, "router_locality_loss_coef": 0.1, "expert_nodes": [0] * 6}
    logits = (torch.randn(12, 6).abs() * scale).requires_grad_()

    losses = losses_of((logits,), config_of(6, **fields, **coefficients))
    [gradient] = torch.autograd.grad(sum(loss.sum() for loss in losses.values()), logits)

    assert all(loss.isfinite().all() for loss in losses.values())
    assert gradient.isfinite().all()


def test_two_collapsed_layers_that_cancel_do_not_score_as_balanced():
    """Pooled over layers, each expert gets a quarter of the tokens, and the loss is the balanced minimum of 2."""
    losses = losses_of((collapsed_onto([0, 1]), collapsed_onto([2, 3])), config_of())["aux_loss"]

    torch.testing.assert_close(losses, torch.tensor([4.0, 4.0]))


def test_balanced_routing_scores_the_number_of_experts_per_token():
    layer = torch.cat([collapsed_onto([0, 1]), collapsed_onto([2, 3])])

    torch.testing.assert_close(losses_of((layer,), config_of())["aux_loss"], torch.tensor([2.0]))


def test_an_empty_slot_selects_nobody():
    probabilities = (torch.full((2, 4), 0.25),)

    half_empty = load_balancing_losses(probabilities, (torch.tensor([[0, 4], [1, 4]]),))

    torch.testing.assert_close(half_empty, torch.tensor([1.0]))


def test_with_a_cache_the_mask_of_past_tokens_is_left_out():
    """The mask covers past and new tokens; the logits are those of the new ones."""
    new_token_logits = torch.randn(2 * 2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])

    config = config_of(5, router_entropy_loss_coef=0.1, router_locality_loss_coef=0.1, expert_nodes=[0] * 2 + [1] * 3)

    masked = losses_of((new_token_logits,), config, mask)

    torch.testing.assert_close(masked, losses_of((new_token_logits[[0, 2, 3]],), config))
    assert masked.keys() == {"aux_loss", "z_loss", "entropy_loss", "locality_loss"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss_of_a_model(make_moe, make_tokens, side):
    model = make_moe(router_z_loss_coef=0.01)
    tokens = make_tokens(1, 9)
    padding = torch.zeros(1, 5, dtype=torch.long)
    halves = [padding, tokens] if side == "left" else [tokens, padding]
    padded = torch.cat(halves, dim=1)

    with torch.no_grad():
        plain = model(tokens, output_router_logits=True)
        masked = model(padded, attention_mask=(padded != 0).long(), output_router_logits=True)
        unmasked = model(padded, output_router_logits=True)

    for name in ("aux_loss", "z_loss", "router_loss"):
        torch.testing.assert_close(masked[name], plain[name], rtol=1e-4, atol=0)
        assert (unmasked[name] - plain[name]).abs() > 0.01 * plain[name], "padding would not have mattered"


def test_a_model_s_losses_are_the_means_over_its_moe_layers(make_moe, make_tokens):
    model = make_moe(router_aux_loss_coef=0.3, router_z_loss_coef=0.2, mlp_only_layers=[1])
    tokens, mask = make_tokens(2, 6), LEFT_PADDED

    outputs = model(tokens, attention_mask=mask, output_router_logits=True)

    is_token = mask.flatten().bool().tolist()
    assert len(outputs.router_logits) == 2
    balance = sum(naive_reference.balance_loss(logits, model.config, is_token) for logits in outputs.router_logits) / 2
    z = sum(naive_reference.z_loss(logits, is_token) for logits in outputs.router_logits) / 2
    torch.testing.assert_close(outputs.aux_loss, balance)
    torch.testing.assert_close(outputs.z_loss, z)
    torch.testing.assert_close(outputs.router_loss, 0.3 * balance + 0.2 * z)


def test_training_adds_the_router_losses_without_being_asked_for_logits(make_moe, make_tokens):
    model = make_moe(router_aux_loss_coef=0.3, router_z_loss_coef=0.2)
    tokens = make_tokens()

    evaluated = model(tokens, labels=tokens)
    trained = model.train()(tokens, labels=tokens)

    language_modeling = naive_reference.language_modeling_loss(evaluated.logits, tokens)
    torch.testing.assert_close(evaluated.loss, language_modeling)
    torch.testing.assert_close(trained.loss, language_modeling + 0.3 * trained.aux_loss + 0.2 * trained.z_loss)
    assert trained.router_logits is None
    assert evaluated.router_loss is None


def test_every_loss_with_a_weight_is_added(make_moe, make_tokens):
    coefficients = {
        "aux_loss": 0.3,
        "z_loss": 0.2,
        "entropy_loss": 0.15,
        "locality_loss": 0.1,
    }
    fields = {f"router_{name}_coef": value for name, value in coefficients.items()}
    model = make_moe(**fields, expert_nodes=[0, 1, 0, 1]).train()
    tokens = make_tokens()

    outputs = model(tokens, labels=tokens)

    expected = sum(coefficient * outputs[name] for name, coefficient in coefficients.items())
    torch.testing.assert_close(outputs.router_loss, expected)
    language_modeling = naive_reference.language_modeling_loss(outputs.logits, tokens)
    torch.testing.assert_close(outputs.loss, language_modeling + expected)


def test_the_output_has_each_layer_s_losses_and_survives_what_is_done_with_outputs(make_moe, make_tokens):
    model = make_moe(mlp_only_layers=[1], router_aux_loss_coef=0.3, router_entropy_loss_coef=0.1).train()
    outputs = model(make_tokens(), labels=make_tokens(), output_router_logits=True)

    expected = router_losses(model.config, outputs.router_logits, outputs.selected_experts)
    assert outputs.layer_router_losses.keys() == expected.keys() == {"aux_loss", "z_loss", "entropy_loss"}
    for name, layers in outputs.layer_router_losses.items():
        assert torch.equal(layers, expected[name])
        assert not layers.requires_grad
        torch.testing.assert_close(layers.mean(), outputs[name])
    # As FSDP2, Accelerate and a pipe between processes take an output apart and put it together.
    leaves, structure = tree_flatten(outputs)
    assert any(leaf is outputs.layer_router_losses["aux_loss"] for leaf in leaves)
    with torch.no_grad():
        detached = model(make_tokens(), labels=make_tokens(), output_router_logits=True)
    for copy in (tree_unflatten(leaves, structure), pickle.loads(pickle.dumps(detached))):
        assert isinstance(copy, type(outputs))
        assert torch.equal(copy.layer_router_losses["aux_loss"], expected["aux_loss"])
    assert outputs.to_tuple()[0] is outputs.loss
    assert model(make_tokens(), labels=make_tokens(), return_dict=False)[0] == outputs.loss


def test_without_coefficients_training_adds_and_records_nothing(make_moe, make_tokens):
    model = make_moe(router_aux_loss_coef=0.0).train()
    outputs = model(make_tokens(), labels=make_tokens())

    torch.testing.assert_close(outputs.loss, naive_reference.language_modeling_loss(outputs.logits, make_tokens()))
    assert outputs.router_loss is None


@pytest.mark.parametrize("coefficients", [{"router_z_loss_coef": 0.5}, {"router_aux_loss_coef": 0.5}], ids=str)
def test_micro_batches_that_know_the_batch_sum_to_its_loss(make_moe, make_tokens, coefficients):
    """A trainer passes `num_items_in_batch` and sums. The balance loss is not linear in the batch: equal halves."""
    model = make_moe(**{"router_aux_loss_coef": 0.0, **coefficients}).train()
    first = make_tokens(2, 10)
    second = first if "router_aux_loss_coef" in coefficients else make_tokens(2, 10, seed=1)
    batch = torch.cat([first, second])
    num_items_in_batch = torch.tensor(4 * 9)

    whole = model(batch, labels=batch, num_items_in_batch=num_items_in_batch)
    parts = [model(part, labels=part, num_items_in_batch=num_items_in_batch) for part in (first, second)]

    assert whole.router_loss > 0.1
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)
    torch.testing.assert_close(whole.loss, model(batch, labels=batch).loss)
