"""Scores of experts against a reference that goes through the text token by token."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from moe_checkpoints import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from upcycled_moe.common.moe_layers import find_moe_layers
from upcycled_moe.common.packing import BlockPacker
from upcycled_moe.common.routing_pass import run_pass
from upcycled_moe.pruning.scores import SCORES, LogitSimilarity


BLOCK_SIZE = 24
KINDS = ("linear", "zero experts", "top-p", "shared")


def _blocks(document_lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    packer = BlockPacker(BLOCK_SIZE, document_mask=True)
    blocks = []
    for length in document_lengths:
        blocks += [block for block, _ in packer.add(torch.randint(1, 320, (length,), generator=generator).tolist())]
    rest = packer.end()
    return [*blocks, rest] if rest else blocks


@pytest.fixture(scope="module")
def domains():
    return {"code": _blocks([10, 40, 3, 20]), "math": _blocks([5, 30], seed=1)}


def _observe(model, domains, observer, batch_size=2):
    layers = find_moe_layers(model)
    with observer.attached():
        run_pass(model, layers, domains, [observer], batch_size)
    return observer.scores()


def _seen(model, domains):
    """Return, for each MoE layer, residual stream, input, logits, weights and selection of every token."""
    layers = find_moe_layers(model)
    seen = [[] for _ in layers]
    residual, handles = {}, []

    def note(number):
        def hook(_, inputs, outputs):
            tokens = zip(residual["now"].flatten(0, 1), inputs[0], *outputs, strict=True)
            seen[number].extend([value.double() for value in token] for token in tokens)

        return hook

    for number, layer in enumerate(layers):
        decoder = model.base_model.layers[layer.index]
        norm = decoder.post_attention_layernorm
        handles.append(norm.register_forward_pre_hook(lambda _, inputs: residual.update(now=inputs[0])))
        handles.append(decoder.mlp.gate.register_forward_hook(note(number)))
    with torch.no_grad():
        for blocks in domains.values():
            for block in blocks:
                inputs = {name: torch.tensor([block[name]]) for name in ("input_ids", "position_ids")}
                model.base_model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return layers, seen


def _expert(layer, expert, hidden):
    gate, up = layer.experts.gate_up_proj[expert].detach().double().chunk(2)
    return layer.experts.down_proj[expert].detach().double() @ (F.silu(gate @ hidden) * (up @ hidden))


def _reference(method, layer, tokens):
    num_experts = layer.num_computed_experts
    chosen = [[] for _ in range(num_experts)]  # what each token adds to an expert's score
    num_selections = 0
    for residual, hidden, _, weights, selected in tokens:
        filled = [(int(e), w) for e, w in zip(selected, weights, strict=True) if int(e) < layer.num_experts]
        num_selections += len(filled)
        outputs = {
            expert: weight * _expert(layer, expert, hidden) for expert, weight in filled if expert < num_experts
        }
        after = residual + sum(outputs.values(), torch.zeros_like(residual))
        turned = max(0.0, 1 - (residual @ after / residual.norm() / after.norm()).item())
        for expert, output in outputs.items():
            value = {"frequency": 1.0, "merge": 1.0, "reap": output.norm(), "easy_ep": turned * output.norm()}[method]
            chosen[expert].append(float(value))
    if method == "reap":
        return [sum(values) / max(1, len(values)) for values in chosen]
    scale = num_selections if method in ("frequency", "merge") else 1
    return [sum(values) / scale for values in chosen]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_formula(domains, kind):
    layers, seen = _seen(model := make_model(kind), domains)
    for method, score in SCORES.items():
        expected = [_reference(method, layer, tokens) for layer, tokens in zip(layers, seen, strict=True)]
        found = _observe(model, domains, score(model, layers))
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double), rtol=2e-5, atol=0)
        assert len({round(value, 9) for value in found[0].tolist()}) == layers[0].num_computed_experts


@pytest.mark.parametrize("method", SCORES)
def test_the_batch_size_changes_no_score(domains, method):
    model = make_model("mixture")
    layers = find_moe_layers(model)
    first, second = (_observe(model, domains, SCORES[method](model, layers), size) for size in (1, 4))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=0)


def test_similarity_is_the_cosine_of_the_logits_over_all_tokens(domains):
    layers, seen = _seen(model := make_model("zero experts"), domains)
    found = _observe(model, domains, LogitSimilarity(model, layers))
    assert found.shape == (len(layers), 4, 4)
    for number in range(len(layers)):
        logits = torch.stack([logits for _, _, logits, _, _ in seen[number]])[:, :4]
        for first in range(4):
            for second in range(4):
                expected = F.cosine_similarity(logits[:, first], logits[:, second], dim=0)
                torch.testing.assert_close(found[number, first, second], expected, rtol=1e-5, atol=1e-7)


class Computed(TorchDispatchMode):
    """Knows which of the tensors that are computed within it still live, wherever they are held."""

    def __init__(self):
        super().__init__()
        self.references = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        outputs = function(*arguments, **(options or {}))
        self.references += [weakref.ref(value) for value in tree_leaves(outputs) if isinstance(value, torch.Tensor)]
        return outputs

    def num_living_elements(self):
        living = {id(value): value for reference in self.references if (value := reference()) is not None}
        return sum(value.numel() for value in living.values())


@pytest.mark.parametrize("method", [*SCORES, "similarity"])
def test_an_observer_holds_no_more_after_more_text(domains, method):
    model = make_model("linear")
    layers = find_moe_layers(model)
    held = []
    for text in ({"code": domains["code"][:1]}, {"code": domains["code"][:1] * 8}):
        with Computed() as computed:
            observer = {**SCORES, "similarity": LogitSimilarity}[method](model, layers)
            with observer.attached():
                run_pass(model, layers, text, [observer], batch_size=1)
        held.append(computed.num_living_elements())
    assert held[0] == held[1] > 0
