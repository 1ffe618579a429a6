"""The loss in chunks is the plain one, with its gradients, and holds one chunk's logits at most."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed._tools.mem_tracker import MemTracker

from modeling_upcycled_moe.chunked_loss_upcycled_moe import chunked_causal_lm_loss


def _step(model, tokens, **inputs):
    """Return the loss and all gradients of one step."""
    model.zero_grad()
    outputs = model(tokens, **{"labels": tokens, **inputs})
    outputs.loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return outputs, gradients


def _assert_same_step(chunked, plain, tolerance):
    assert chunked[0].logits is None
    assert plain[0].logits is not None
    torch.testing.assert_close(chunked[0].loss, plain[0].loss, rtol=tolerance, atol=0)
    assert chunked[1].keys() == plain[1].keys()
    for name, gradient in chunked[1].items():
        assert gradient.dtype == plain[1][name].dtype
        # Below the head rounding adds up, most in the key biases, whose gradients nearly cancel.
        allowed = tolerance if "lm_head" in name else 3 * tolerance
        assert (gradient - plain[1][name]).norm() <= allowed * plain[1][name].norm(), name


def _masked(tokens, share):
    return tokens.masked_fill(torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < share, -100)


LABELS = {
    "all": lambda tokens: {},
    "some": lambda tokens: {"labels": _masked(tokens, 0.5)},
    "divided by a number": lambda tokens: {"labels": _masked(tokens, 0.2), "num_items_in_batch": 77},
    "divided by a tensor": lambda tokens: {"num_items_in_batch": torch.tensor(77)},
    "shifted": lambda tokens: {"shift_labels": _masked(tokens.flip(1), 0.2)},
}


@pytest.mark.parametrize("inputs", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_the_plain_ones(make_moe, make_tokens, inputs, tied):
    model = make_moe(tie_word_embeddings=tied, router_aux_loss_coef=0.3).train()
    tokens = make_tokens(3, 16)

    plain = _step(model, tokens, **inputs(tokens))
    # 48 tokens in chunks of 10, the last one smaller.
    chunked = _step(model, tokens, loss_chunk_tokens=10, **inputs(tokens))

    _assert_same_step(chunked, plain, 1e-6)
    torch.testing.assert_close(chunked[0].router_loss, plain[0].router_loss, rtol=0, atol=0)


def test_the_model_s_attribute_is_the_default_and_zero_means_all_at_once(make_moe, make_tokens):
    model, tokens = make_moe(), make_tokens()
    model.loss_chunk_tokens = 10

    assert model(tokens).logits is not None
    assert model(tokens, labels=tokens).logits is None
    plain = model(tokens, labels=tokens, loss_chunk_tokens=0)
    assert plain.logits is not None
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, labels=tokens).loss, plain.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("is_autocast", [True, False])
def test_bfloat16_is_as_close_as_bfloat16_is(make_moe, make_tokens, is_autocast):
    model, tokens = make_moe(router_aux_loss_coef=0.0).train(), make_tokens(4, 24)
    exact = copy.deepcopy(model)
    if not is_autocast:
        model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        plain = _step(model, tokens)
        chunked = _step(model, tokens, loss_chunk_tokens=10)

    _assert_same_step(chunked, plain, 1e-2)
    assert chunked[1]["lm_head.weight"].dtype == (torch.float32 if is_autocast else torch.bfloat16)
    expected = _step(exact, tokens)[1]["lm_head.weight"]

    def error(step):
        return (step[1]["lm_head.weight"].float() - expected).norm()

    assert error(chunked) < 1.2 * error(plain)


def test_accumulated_and_scaled_gradients_are_the_plain_ones(make_moe, make_tokens):
    """As a trainer accumulates micro-batches, with the scaled loss of float16."""
    model, tokens = make_moe(router_aux_loss_coef=0.3).train(), make_tokens(4, 16)
    gradients = []
    for chunk_tokens in (0, 10):
        model.zero_grad()
        for rows in tokens.split(1):
            outputs = model(rows, labels=rows, num_items_in_batch=60, loss_chunk_tokens=chunk_tokens)
            (1024 * outputs.loss).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        gradients[-1] = {name: gradient.clone() for name, gradient in gradients[-1].items()}
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 3e-6 * gradient.norm(), name


def test_a_batch_without_targets_gives_what_the_plain_loss_gives(make_moe, make_tokens):
    model, tokens = make_moe(router_aux_loss_coef=0.0).train(), make_tokens()
    labels = torch.full_like(tokens, -100)

    plain = _step(model, tokens, labels=labels)
    chunked = _step(model, tokens, labels=labels, loss_chunk_tokens=10)

    assert plain[0].loss.isnan()
    assert chunked[0].loss.isnan()
    assert not any(gradient.any() for gradient in [*plain[1].values(), *chunked[1].values()])
    counted = _step(model, tokens, labels=labels, loss_chunk_tokens=10, num_items_in_batch=5)
    assert counted[0].loss == 0


def test_frozen_heads_and_frozen_bodies_get_no_gradient(make_moe, make_tokens):
    tokens = make_tokens()
    for frozen in ("lm_head", "model"):
        model = make_moe(router_aux_loss_coef=0.0).train()
        getattr(model, frozen).requires_grad_(False)
        _assert_same_step(_step(model, tokens, loss_chunk_tokens=10), _step(model, tokens), 1e-6)
        assert all(parameter.grad is None for parameter in getattr(model, frozen).parameters())


HEADS = {
    "adapters": lambda model: get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False)),
    "a trained copy": lambda model: get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
    "hooks": lambda model: [model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output), model][1],
}


@pytest.mark.parametrize("prepare", HEADS.values(), ids=HEADS)
def test_heads_that_do_more_than_multiply_are_called(make_moe, make_tokens, prepare):
    model, tokens = prepare(make_moe(router_aux_loss_coef=0.3)).train(), make_tokens()

    plain = _step(model, tokens)
    _assert_same_step(_step(model, tokens, loss_chunk_tokens=10), plain, 1e-6)


class _Loss(torch.nn.Module):
    """The loss of a head alone, as a module, of which the tracker asks that it is called once."""

    def __init__(self):
        super().__init__()
        self.lm_head = torch.nn.Linear(16, 2048, bias=False)

    def forward(self, hidden_states, labels, chunk_tokens):
        return chunked_causal_lm_loss(self.lm_head, hidden_states, labels, chunk_tokens)


def _peak_bytes(chunk_tokens, has_hook):
    """Return the peak of all tensors in forward and backward pass over 4096 tokens of 2048 words."""
    module = _Loss()
    if has_hook:
        module.lm_head.register_forward_hook(lambda module, inputs, output: None)
    hidden_states = torch.randn(1, 4096, 16, requires_grad=True)
    labels = torch.randint(0, 2048, (1, 4096))
    tracker = MemTracker()
    tracker.track_external(module, hidden_states, labels)
    with tracker:
        module(hidden_states, labels, chunk_tokens).backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize(("has_hook", "num_chunks"), [(False, 1), (True, 3)])
def test_no_more_than_a_chunk_of_logits_is_in_memory(has_hook, num_chunks):
    logits_bytes = 4096 * 2048 * 4
    assert _peak_bytes(4096, has_hook) > logits_bytes
    # Beside chunks: the hidden states, the weight, and their gradients, 3 % of the logits.
    assert _peak_bytes(128, has_hook) < logits_bytes * (0.03 + num_chunks / 32)


def test_a_step_compiles_as_one_graph(make_moe, make_tokens):
    model, tokens = make_moe(num_hidden_layers=1, router_aux_loss_coef=0.3).train(), make_tokens(2, 16)
    model.set_experts_implementation("batched_mm")
    plain = _step(model, tokens)

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs, gradients = _step(compiled, tokens, loss_chunk_tokens=10)

    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    _assert_same_step((outputs, gradients), plain, 1e-5)


def test_gradients_are_used_up_by_one_backward_pass(make_moe, make_tokens):
    model, tokens = make_moe().train(), make_tokens()
    loss = model(tokens, labels=tokens, loss_chunk_tokens=10).loss
    loss.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="has one backward pass, which uses its gradients up"):
        loss.backward()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"loss_chunk_tokens": -1}, "loss_chunk_tokens=-1 is negative"),
        ({"loss_chunk_tokens": 8, "logits_to_keep": 1}, "returns no logits"),
    ],
    ids=str,
)
def test_arguments_that_exclude_each_other_are_refused(make_moe, make_tokens, inputs, message):
    with pytest.raises(ValueError, match=message):
        make_moe()(make_tokens(), labels=make_tokens(), **inputs)


def test_another_loss_function_is_not_passed_over(make_moe, make_tokens):
    model = make_moe()
    model.loss_function = lambda logits, labels, **_: logits.sum()

    with pytest.raises(ValueError, match="knows no other loss_function"):
        model(make_tokens(), labels=make_tokens(), loss_chunk_tokens=8)
