"""Coefficients by usage: what routers weight experts with on text, counted by hand."""

import pytest
import torch
from dense_checkpoints import byte_level_tokenizer
from moe_checkpoints import make_model

from upcycled_moe.common.moe_source import open_moe
from upcycled_moe.common.progress import Progress
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.text_settings import TextSettings
from upcycled_moe.merging.layout import ExpertLayout, expert_layout
from upcycled_moe.merging.usage import measure_coefficients


def _layout(model, num_slices=1, factors=(1.0, None)):
    config = model.config
    return ExpertLayout(tuple(config.moe_layers), config.num_experts, num_slices, 24, *factors)


def _text(text_file, **settings):
    return TextSettings([str(text_file)], tokens_per_domain=100, block_size=32, **settings)


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(model)`: the model with a tokenizer on disk, opened."""

    def write(model):
        model.save_pretrained(tmp_path / "moe")
        byte_level_tokenizer().save_pretrained(tmp_path / "moe")
        return open_moe(str(tmp_path / "moe"))

    return write


def _constant_input_(model):
    """Let the experts' input be one vector for all tokens, ones in all places, from the embedding on."""
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.post_attention_layernorm.weight.fill_(1.0)
            layer.mlp.experts.down_proj.zero_()
            if layer.mlp.shared_expert is not None:
                layer.mlp.shared_expert.down_proj.weight.zero_()


def _send_(model, logits):
    """Let every token have the router logits `logits`, one list a layer."""
    _constant_input_(model)
    hidden = model.config.hidden_size
    with torch.no_grad():
        for layer, values in zip(model.model.layers, logits, strict=True):
            layer.mlp.gate.weight.copy_(torch.tensor(values)[:, None].expand(-1, hidden) / hidden)


def _top_two(logits):
    """Return the weights of the two experts with the highest logits, zero for others."""
    best = sorted(range(len(logits)), key=lambda expert: -logits[expert])[:2]
    weights = torch.tensor([logits[expert] for expert in best]).softmax(0).tolist()
    return [weights[best.index(expert)] if expert in best else 0.0 for expert in range(len(logits))]


def test_the_coefficients_are_the_weights_that_every_token_gives(checkpoint, text_file):
    model = make_model("linear")
    logits = [[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, 3.0, -1.0], [-1.0, 4.0, -2.0, 3.0]]
    _send_(model, logits)
    coefficients, num_tokens = measure_coefficients(checkpoint(model), _layout(model), _text(text_file), Progress())
    assert coefficients.shared is None
    assert num_tokens == {"sample": 100}
    for layer, values in enumerate(logits):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            assert coefficients.layers[layer][matrix] == pytest.approx(_top_two(values), abs=1e-5)


def test_experts_without_computation_take_no_share(checkpoint, text_file):
    model = make_model("zero experts", num_experts_per_tok=3, router_type="linear")
    # Two experts with weights and the first of the two others.
    _send_(model, [[2.0, 1.0, -1.0, -1.0, 3.0, -1.0]] * 3)
    coefficients, _ = measure_coefficients(checkpoint(model), _layout(model), _text(text_file), Progress())
    assert coefficients.layers[1]["up_proj"] == pytest.approx(_top_two([2.0, 1.0, -1.0, -1.0]), abs=1e-5)


def test_a_slice_that_nobody_uses_is_an_error(checkpoint, text_file):
    model = make_model("linear")
    _send_(model, [[2.0, 1.0, 0.0, -1.0]] * 3)
    with pytest.raises(SettingsError, match="layer 0: no token went to any expert of slice 1 that has weights"):
        measure_coefficients(checkpoint(model), _layout(model, num_slices=2), _text(text_file), Progress())


GATINGS = {
    # The gate is a sigmoid of the sum of the input, which is 32, times a weight.
    "sigmoid": lambda: torch.sigmoid(torch.tensor(32 * 0.03)).item(),
    "plain": lambda: 1.0,
    "complement": lambda: 1 - torch.tensor([2.0, 1.0, 0.0, -1.0]).softmax(0)[0].item(),
}


@pytest.mark.parametrize("gating", GATINGS)
def test_the_shared_expert_is_weighed_against_all(checkpoint, text_file, gating):
    """By FFNs as they were before their outputs were halved."""
    model = make_model(
        "shared",
        router_type="linear",
        shared_expert_intermediate_size=24,
        shared_expert_gating=gating,
        norm_topk_prob=gating != "sigmoid",
    )
    logits = [2.0, 1.0, 0.0, -1.0]
    _send_(model, [logits] * 3)
    if gating == "sigmoid":
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.shared_expert_gate.weight.fill_(0.03)
    probabilities = torch.tensor(logits).softmax(0)
    routed = {"sigmoid": probabilities[:2].sum().item(), "plain": 1.0, "complement": probabilities[0].item()}[gating]
    shared, factors = GATINGS[gating](), (0.5, 0.75)
    layout = _layout(model, factors=factors)
    coefficients, _ = measure_coefficients(checkpoint(model), layout, _text(text_file), Progress())
    expected = 0.75 * shared / (0.75 * shared + 0.5 * routed)
    assert coefficients.shared == pytest.approx(dict.fromkeys(range(3), expected), abs=1e-5)


def test_fresh_shared_experts_count_as_much_as_the_others(upcycled, text_file):
    for gating in ("sigmoid", "plain"):
        _, source = upcycled("qwen2", shared_expert=gating)
        coefficients, _ = measure_coefficients(source, expert_layout(source), _text(text_file), Progress())
        assert coefficients.shared == pytest.approx(dict.fromkeys(range(3), 0.5), abs=1e-6)


def test_the_size_of_batches_changes_no_figure(upcycled, text_file):
    _, source = upcycled("qwen2")
    found = [
        measure_coefficients(source, expert_layout(source), _text(text_file, batch_size=size), Progress())[0]
        for size in (1, 3)
    ]
    for layer in range(3):
        assert found[0].layers[layer]["up_proj"] == pytest.approx(found[1].layers[layer]["up_proj"], rel=1e-5)
        assert len(set(found[0].layers[layer]["up_proj"])) == 4


def test_a_checkpoint_without_a_tokenizer_cannot_read_text(upcycled, text_file):
    _, source = upcycled("qwen2", {"tokenizer": False})
    with pytest.raises(SettingsError, match="has no tokenizer to read text with"):
        measure_coefficients(source, expert_layout(source), _text(text_file), Progress())
