"""Experts that are selected together, against what their loads give."""

from itertools import permutations

import pytest
import torch
from routed import measured, random_tokens, routed, subject

from upcycled_moe.analysis.measures.co_activation import CoActivation, pairs_by_load


def _tokens(selected, num_experts):
    return routed(0, selected, [[1.0] * len(selected[0])] * len(selected), torch.zeros(len(selected), num_experts))


def test_figures_by_hand():
    tokens = _tokens([[0, 1], [1, 0], [0, 2], [4, 3]], num_experts=4)

    result = measured(CoActivation, subject(1, 4), tokens)

    assert result.tables["co_activation"] == [
        [
            [None, pytest.approx(2 / 3), pytest.approx(1 / 3), 0.0],
            [1.0, None, 0.0, 0.0],
            [1.0, 0.0, None, 0.0],
            [0.0, 0.0, 0.0, None],
        ]
    ]
    # Tokens 3, 2, 1, 1; with the closest partner 2, 2, 1, 0.
    assert result.per_layer["co_activation"] == pytest.approx([5 / 7])


def test_fixed_pairs_against_balanced_loads():
    result = measured(CoActivation, subject(1, 4), _tokens([[0, 1]] * 3 + [[2, 3]] * 3, num_experts=4))

    assert result.per_layer["co_activation"] == [1.0]
    assert result.per_layer["co_activation_by_load"] == pytest.approx([1 / 3])


def test_an_expert_in_every_token_is_load_and_no_pairing():
    tokens = _tokens([[0, expert] for expert in (1, 2, 2, 3, 3, 3)] * 50, num_experts=4)

    figures = measured(CoActivation, subject(1, 4), tokens).per_layer

    assert figures["co_activation"] == pytest.approx([(150 + 50 + 100 + 150) / 600])
    assert figures["co_activation_by_load"] == pytest.approx(figures["co_activation"], abs=0.01)


def test_an_expert_meets_no_other_more_often_than_it_is_selected():
    """Experts 0 and 1 are in all ten triples, the others in one each: by load the two would meet more often."""
    tokens = _tokens([[0, 1, expert] for expert in range(2, 12)], num_experts=12)

    figures = measured(CoActivation, subject(1, 12, 3), tokens).per_layer

    pairs = torch.zeros(1, 12, 12, dtype=torch.float64)
    for first, second in [*permutations(range(2)), *[(a, b) for a in range(2) for b in range(2, 12)]]:
        pairs[0, first, second] = pairs[0, second, first] = 10 if second < 2 else 1
    by_load = pairs_by_load(pairs)[0]
    assert by_load[0, 1] > 10
    largest = [10, 10, *[by_load[0, 2].item()] * 10]
    assert figures["co_activation_by_load"] == [pytest.approx(sum(largest) / 30)]


def test_tokens_with_one_expert_have_no_pairs():
    result = measured(CoActivation, subject(1, 3, 1), _tokens([[0], [1], [1]], num_experts=3))

    assert list(result.per_layer.values()) == [[None], [None]]
    assert result.tables["co_activation"] == [[[None, 0.0, 0.0], [0.0, None, 0.0], [None, None, None]]]
    assert len(result.notes) == 1


@pytest.mark.parametrize("num_top", [2, 3])
def test_shares_equal_the_naive_count(num_top):
    num_experts = 5
    tokens = random_tokens(0, 60, num_experts, num_top, seed=0, unused=1)

    result = measured(CoActivation, subject(1, num_experts, num_top), tokens)

    sets = [set(experts) for experts in tokens.selected.tolist()]
    closest = total = 0
    for first in range(num_experts):
        having = [experts for experts in sets if first in experts]
        counts = [sum(second in experts for experts in having) for second in range(num_experts) if second != first]
        row = result.tables["co_activation"][0][first]
        shares = [row[second] for second in range(num_experts) if second != first]
        assert row[first] is None
        assert shares == ([pytest.approx(count / len(having)) for count in counts] if having else [None] * 4)
        closest, total = closest + max(counts), total + len(having)
    assert result.per_layer["co_activation"] == pytest.approx([closest / total])


def test_pairs_by_load_have_the_same_loads_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.rand(2, 6, 6, generator=generator, dtype=torch.float64)
    pairs[1, 4] = pairs[1, :, 4] = 0
    pairs = pairs + pairs.mT
    pairs -= torch.diag_embed(pairs.diagonal(dim1=-2, dim2=-1))

    expected = pairs_by_load(pairs)

    torch.testing.assert_close(expected.sum(dim=-1), pairs.sum(dim=-1))
    assert not expected[1, 4].any()
    assert not expected.diagonal(dim1=-2, dim2=-1).any()
    # Products of a factor an expert: exchanging partners changes no product.
    for first, second, third, fourth in permutations(range(6), 4):
        torch.testing.assert_close(
            expected[:, first, second] * expected[:, third, fourth],
            expected[:, first, fourth] * expected[:, third, second],
        )
