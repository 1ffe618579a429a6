"""Router saturation: by hand, against sets, and what cannot be compared."""

from types import SimpleNamespace

import pytest
import torch

from upcycled_moe.analysis.measures import Subject
from upcycled_moe.analysis.saturation import FIGURES, RecordedSelections, SelectionRecorder, compare
from upcycled_moe.common.moe_layers import RoutedTokens


def _recorded(selected, num_experts, input_ids=None, layers=None):
    selected = torch.tensor(selected, dtype=torch.int16)
    num_layers, num_tokens, _ = selected.shape
    ids = torch.arange(num_tokens) if input_ids is None else torch.tensor(input_ids)
    return RecordedSelections(ids, selected, tuple(range(num_layers)) if layers is None else layers, num_experts)


def _random(num_tokens, num_experts, num_slots, seed):
    """Selections of two layers by uneven loads."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 1, num_experts, generator=generator) + torch.randn(
        2, num_tokens, num_experts, generator=generator
    )
    return logits.topk(num_slots).indices.tolist()


def _routed(input_ids, selected, domain=0):
    ids = torch.tensor(input_ids)
    nothing = torch.zeros(ids.numel(), 1)
    return RoutedTokens(domain, ids, ids, nothing, nothing, nothing, nothing, torch.tensor(selected))


def _recorder(max_tokens, num_domains=2, num_layers=2):
    layers = [SimpleNamespace(index=index, num_experts=4) for index in (1, 3)[:num_layers]]
    return SelectionRecorder(Subject(layers, ["domain"] * num_domains, torch.device("cpu")), max_tokens)


def test_three_tokens_by_hand():
    """Common are both, one and none of two experts: 1/2. The loads of experts are 2, 2, 1, 1 and 2, 1, 2, 1 of 3."""
    first = _recorded([[[0, 1], [0, 1], [2, 3]]], 4)
    second = _recorded([[[1, 0], [2, 0], [2, 3]]], 4)
    third = _recorded([[[1, 0], [2, 0], [0, 1]]], 4)

    comparison = compare("a", first, "b", second)

    assert (comparison.first, comparison.second) == ("a", "b")
    assert comparison.per_layer["router_saturation"] == [pytest.approx((2 + 1 + 2) / 6)]
    assert comparison.per_layer["router_saturation_by_load"] == [
        pytest.approx((2 * 2 + 2 * 1 + 1 * 2 + 1 * 1) / 9 / 2)
    ]
    assert compare("a", first, "c", third).per_layer["router_saturation"] == [pytest.approx((2 + 1 + 0) / 6)]


def test_a_checkpoint_saturates_itself():
    recorded = _recorded(_random(50, 6, 2, 0), 6)

    assert compare("a", recorded, "a", recorded).per_layer["router_saturation"] == [1.0, 1.0]


def test_sizes_and_empty_slots_may_differ():
    """Of the experts {0, 1} and {1}; {2} and none; none and none."""
    first = _recorded([[[0, 1], [2, 4], [4, 4]]], 4)
    second = _recorded([[[1], [4], [4]]], 4)

    comparison = compare("a", first, "b", second)

    assert comparison.per_layer["router_saturation"] == [pytest.approx((1 / 2 + 0 + 1) / 3)]
    # Expert 1 is selected by a third of the tokens in both; sizes are 2, 1 and 0.
    assert comparison.per_layer["router_saturation_by_load"] == [pytest.approx(1 / 9 / 1)]


@pytest.mark.parametrize("num_slots", [1, 3])
def test_the_overlap_is_that_of_sets(num_slots):
    first, second = (_random(200, 8, num_slots, seed) for seed in (0, 1))

    comparison = compare("a", _recorded(first, 8), "b", _recorded(second, 8))

    for layer in range(2):
        common = [len(set(a) & set(b)) / num_slots for a, b in zip(first[layer], second[layer], strict=True)]
        assert comparison.per_layer["router_saturation"][layer] == pytest.approx(sum(common) / len(common))


def test_routers_that_know_nothing_of_each_other_agree_as_the_loads_say():
    first, second = (_random(20000, 8, 2, seed) for seed in (0, 1))

    figures = compare("a", _recorded(first, 8), "b", _recorded(second, 8)).per_layer

    assert figures["router_saturation"] == pytest.approx(figures["router_saturation_by_load"], abs=0.01)
    assert list(figures) == [figure.name for figure in FIGURES]


def test_what_differs_in_tokens_experts_or_layers_is_not_compared():
    selected = [[[0, 1], [2, 3]]]
    recorded = _recorded(selected, 4)

    assert compare("a", recorded, "b", _recorded(selected, 4)) is not None
    assert compare("a", recorded, "b", _recorded(selected, 4, input_ids=[0, 2])) is None
    assert compare("a", recorded, "b", _recorded([[[0, 1]]], 4)) is None
    assert compare("a", recorded, "b", _recorded(selected, 5)) is None
    assert compare("a", recorded, "b", _recorded(selected, 4, layers=(1,))) is None


def test_the_first_tokens_of_each_domain_are_recorded():
    recorder = _recorder(max_tokens=3)
    for layer in range(2):
        recorder.update(layer, _routed([[10, 11]], [[layer], [1]]))
        recorder.update(layer, _routed([[20, 21], [22, 23]], [[2], [3], [layer], [0]], domain=1))
        recorder.update(layer, _routed([[12, 13]], [[4], [3]]))
        recorder.update(layer, _routed([[14, 15]], [[0], [0]]))

    recorded = recorder.selections()

    assert recorded.input_ids.tolist() == [10, 11, 12, 20, 21, 22]
    assert recorded.selected.tolist() == [[[layer], [1], [4], [2], [3], [layer]] for layer in range(2)]
    assert (recorded.layers, recorded.num_experts) == ((1, 3), 4)


def test_by_default_4096_tokens_of_a_domain_are_recorded():
    recorder = SelectionRecorder(_recorder(max_tokens=1, num_domains=1, num_layers=1).subject)

    recorder.update(0, _routed([list(range(5000))], [[0]] * 5000))

    assert len(recorder.selections().input_ids) == 4096


def test_what_is_recorded_takes_no_more_than_the_tokens_kept():
    """A slice of a batch would hold the whole of it."""
    recorder = _recorder(max_tokens=1, num_domains=1, num_layers=1)
    batch = _routed([list(range(1000))], [[0]] * 1000)

    recorder.update(0, batch)

    kept = [*recorder._selected[0][0], *recorder._input_ids[0]]
    assert [tensor.untyped_storage().nbytes() for tensor in kept] == [2, 8]
