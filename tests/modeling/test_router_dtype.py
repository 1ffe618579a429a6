"""Routers in float32 inside a model that computes in bfloat16."""

import pytest
import torch
from test_modeling_upcycled_moe import KINDS

from modeling_upcycled_moe import UpcycledQwenMoeForCausalLM


ROUTERS = {
    "linear": {"router_type": "linear"},
    "mixture": {"num_routers": 8},
    "best key": {"num_routers": 8, "router_pooling": "max"},
    "mlp": {"router_type": "mlp"},
    "grouped average": {"router_type": "grouped_average"},
}


def _router(make_moe, dtype, **fields):
    fields = {"num_hidden_layers": 1, "num_experts": 16, **fields}
    return make_moe(**fields, router_dtype=dtype).model.layers[0].mlp.gate


@pytest.fixture
def tokens():
    """Enough of them that some lie between two experts."""
    return torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("is_autocast", [True, False])
@pytest.mark.parametrize("fields", ROUTERS.values(), ids=ROUTERS)
@torch.no_grad()
def test_logits_and_choice_are_those_of_float32(make_moe, tokens, fields, is_autocast):
    router = _router(make_moe, "float32", **fields)
    stock = _router(make_moe, None, **fields)
    if not is_autocast:
        router.bfloat16()
        stock.bfloat16()
    reference = _router(make_moe, None, **fields)
    reference.load_state_dict(router.state_dict())
    expected, _, chosen = reference(tokens.float())

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        logits, weights, index = router(tokens)
        stock_logits, _, stock_index = stock(tokens)

    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(index, chosen)
    assert weights.dtype == torch.bfloat16
    assert stock_logits.dtype == torch.bfloat16
    assert (stock_index != chosen).any(), "bfloat16 flips nothing here, so that the test shows nothing"


def test_weights_load_and_save_in_float32_in_a_bfloat16_model(make_moe, make_tokens, tmp_path):
    fields = {"mlp_only_layers": [0], "shared_expert_intermediate_size": 24, "use_router_bias": True}
    make_moe(router_dtype="float32", **fields).save_pretrained(tmp_path / "start")
    model = UpcycledQwenMoeForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.bfloat16).train()

    in_float32 = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    names = ("query_weight", "keys", "selector.e_score_correction_bias")
    assert in_float32 == {f"model.layers.{layer}.mlp.gate.{name}" for layer in (1, 2) for name in names}

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model(make_tokens(), labels=make_tokens()).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path / "trained")
    loaded = UpcycledQwenMoeForCausalLM.from_pretrained(tmp_path / "trained")

    weights = model.state_dict()
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == weights[name].dtype
        assert torch.equal(tensor, weights[name]), name
    assert torch.equal(loaded(make_tokens()).logits, model(make_tokens()).logits)
    # A step of 1e-5 would have been lost in bfloat16.
    keys = weights["model.layers.1.mlp.gate.keys"]
    assert not torch.equal(keys, keys.bfloat16().float())


def test_stock_types_are_the_default(make_moe, tmp_path):
    make_moe(router_type="linear").save_pretrained(tmp_path)
    model = UpcycledQwenMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)

    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


@torch.no_grad()
def test_a_folded_router_chooses_the_same(make_moe, tokens):
    model = make_moe(num_hidden_layers=1, num_experts=16, router_dtype="float32")
    gate = model.model.layers[0].mlp.gate
    expected, _, chosen = gate(tokens)
    folded = model.fold_routers().model.layers[0].mlp.gate
    logits, _, index = folded(tokens)

    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert folded.weight.dtype == torch.float32
    assert (index != chosen).float().mean() < 1e-3


@pytest.mark.parametrize("fields", [{}, {"router_jitter_noise": 0.1}], ids=str)
def test_in_a_float32_model_nothing_changes(make_moe, make_tokens, fields):
    losses = []
    for dtype in (None, "float32"):
        model = make_moe(router_dtype=dtype, **fields).train()
        torch.manual_seed(1)
        losses.append(model(make_tokens(), labels=make_tokens()).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("is_autocast", [True, False])
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_every_kind_of_model_trains_in_bfloat16(make_moe, make_tokens, fields, is_autocast):
    model = make_moe(router_dtype="float32", router_z_loss_coef=0.1, **fields).train()
    if not is_autocast:
        model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        loss = model(make_tokens(), labels=make_tokens()).loss
    loss.backward()

    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_bfloat16_step_compiles_as_one_graph(make_moe, make_tokens):
    model = make_moe(num_hidden_layers=1, router_dtype="float32", router_z_loss_coef=0.1).train()
    model.set_experts_implementation("batched_mm")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(make_tokens(), labels=make_tokens(), output_router_logits=True)
        outputs = compiled(make_tokens(), labels=make_tokens(), output_router_logits=True)
    outputs.loss.backward()

    assert {logits.dtype for logits in outputs.router_logits} == {torch.float32}
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-2, atol=0)
    assert all(parameter.grad is not None for parameter in model.parameters())
