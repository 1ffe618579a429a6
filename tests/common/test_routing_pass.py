"""The pass over the text: measures see every token once, as the model sees it, and nothing is kept."""

import weakref

import pytest
import torch
from moe_checkpoints import make_model

from upcycled_moe.analysis.measures import MEASURES, Subject
from upcycled_moe.common.moe_layers import find_moe_layers
from upcycled_moe.common.packing import BlockPacker
from upcycled_moe.common.routing_pass import run_pass
from upcycled_moe.common.settings import SettingsError


BLOCK_SIZE = 24
DOMAINS = ("code", "math")


def _blocks(document_lengths, seed=0):
    """Blocks of documents with random tokens; what is left over is a shorter one."""
    generator = torch.Generator().manual_seed(seed)
    packer = BlockPacker(BLOCK_SIZE, document_mask=True)
    blocks = []
    for length in document_lengths:
        tokens = torch.randint(1, 320, (length,), generator=generator).tolist()
        blocks += [block for block, _ in packer.add(tokens)]
    rest = packer.end()
    return [*blocks, rest] if rest else blocks


@pytest.fixture(scope="module")
def domains():
    return {"code": _blocks([10, 40, 3, 50, 20, 13]), "math": _blocks([5, 30], seed=1)}


class _Everything:
    """Keeps all that a measure is shown, by MoE layer and domain."""

    def __init__(self):
        self.seen = {}

    def update(self, number, tokens):
        self.seen.setdefault((number, tokens.domain), []).append(tokens)

    def joined(self, name, number, domain):
        return torch.cat([getattr(tokens, name).flatten(0, -2) for tokens in self.seen[number, domain]])


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_token_is_seen_once_with_its_domain(domains, batch_size):
    model = make_model("linear")
    everything = _Everything()
    run_pass(model, find_moe_layers(model), domains, [everything], batch_size)
    assert sorted(everything.seen) == [(number, domain) for number in range(3) for domain in range(2)]
    for (number, domain), seen in everything.seen.items():
        expected = domains[DOMAINS[domain]]
        for name in ("input_ids", "position_ids"):
            flat = [value for tokens in seen for value in getattr(tokens, name).flatten().tolist()]
            assert flat == [value for block in expected for value in block[name]]
        assert all(tokens.hidden_states.shape[0] == tokens.input_ids.numel() for tokens in seen)
        assert sum(len(tokens.selected) for tokens in seen) == sum(len(block["input_ids"]) for block in expected)
        assert max(len(tokens.input_ids) for tokens in seen) <= batch_size, number


@pytest.mark.parametrize("kind", ["linear", "mixtral", "olmoe"])
def test_packed_documents_do_not_see_each_other(domains, kind):
    model = make_model(kind)
    layers = find_moe_layers(model)
    packed, alone = _Everything(), _Everything()
    (block, *_) = domains["code"]
    starts = [place for place, position in enumerate(block["position_ids"]) if position == 0]
    assert len(starts) > 1
    documents = [
        {name: values[begin:end] for name, values in block.items()}
        for begin, end in zip(starts, [*starts[1:], None], strict=True)
    ]
    run_pass(model, layers, {"code": [block]}, [packed], 1)
    run_pass(model, layers, {"code": documents}, [alone], 1)
    torch.testing.assert_close(
        packed.joined("router_logits", 2, 0), alone.joined("router_logits", 2, 0), atol=1e-4, rtol=1e-4
    )


def _assert_close(found, expected, where):
    assert type(found) is type(expected), where
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        for key in found:
            _assert_close(found[key], expected[key], (*where, key))
    elif isinstance(found, list):
        assert len(found) == len(expected), where
        for place, pair in enumerate(zip(found, expected, strict=True)):
            _assert_close(*pair, (*where, place))
    elif isinstance(found, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), where
    else:
        assert found == expected, where


def _results(model, domains, batch_size):
    layers = find_moe_layers(model)
    with torch.inference_mode():
        measures = [measure(Subject(layers, DOMAINS, model.device)) for measure in MEASURES]
        run_pass(model, layers, domains, measures, batch_size)
        return {measure.name: measure.result() for measure in measures}


@pytest.mark.parametrize("kind", ["zero experts", "top-p", "mixtral"])
def test_the_batch_size_changes_no_figure(domains, kind):
    model = make_model(kind)
    one, four = (_results(model, domains, batch_size) for batch_size in (1, 4))
    assert one.keys() == four.keys() == {measure.name for measure in MEASURES}
    for name, result in one.items():
        assert result.per_layer
        _assert_close(result.per_layer, four[name].per_layer, (name,))
        _assert_close(result.tables, four[name].tables, (name,))


def test_nothing_of_a_batch_is_kept(domains):
    """All measures together hold sums only: what a router saw is gone when the next but one sees its tokens."""
    model = make_model("linear")
    layers = find_moe_layers(model)
    measures = [measure(Subject(layers, DOMAINS, model.device)) for measure in MEASURES]
    shown, most_alive = [], 0

    class Watch:
        def update(self, number, tokens):
            nonlocal most_alive
            shown.extend(weakref.ref(tensor) for tensor in (tokens.hidden_states, tokens.router_logits))
            most_alive = max(most_alive, sum(reference() is not None for reference in shown))

    run_pass(model, layers, domains, [*measures, Watch()], 1)
    assert len(shown) == 2 * 3 * sum(map(len, domains.values()))
    assert most_alive <= 4
    assert not any(reference() is not None for reference in shown)


def test_logits_of_the_vocabulary_are_not_computed(domains):
    model = make_model("linear")
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the output head runs"))
    run_pass(model, find_moe_layers(model), domains, [], 4)


def test_blocks_are_counted(domains):
    model, counted = make_model("linear"), []
    run_pass(model, find_moe_layers(model), domains, [], 4, counted.append)
    assert counted == [4, 1, 1, 1, 1]


def _break(model, value):
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[2, 0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_router_logits_that_are_not_finite_are_an_error(domains, value):
    model = make_model("linear")
    _break(model, value)
    with pytest.raises(SettingsError, match="the router logits of layer 1 are not finite; compute in float32"):
        run_pass(model, find_moe_layers(model), domains, [], 4)


def test_a_batch_that_turns_out_not_finite_is_an_error_too(domains):
    """Only in the last domain: nothing is read back from the device for each batch, but for each domain."""
    model = make_model("linear")
    only_in_math = domains["math"][0]["input_ids"][-1]
    domains = {"code": [{**block, "input_ids": [1] * len(block["input_ids"])} for block in domains["code"]]} | {
        "math": domains["math"]
    }
    assert only_in_math != 1
    with torch.no_grad():
        model.model.embed_tokens.weight[only_in_math] = float("nan")
    with pytest.raises(SettingsError, match="the router logits of layer 0 are not finite"):
        run_pass(model, find_moe_layers(model), domains, [], 4)
