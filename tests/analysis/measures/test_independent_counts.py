"""Chance, against every outcome counted and against random routing."""

import itertools
import math

import pytest
import torch

from upcycled_moe.analysis.measures.independent_counts import count_probabilities, largest_counts_bound


def _uneven_top_k(num_segments, num_tokens, num_experts, num_slots):
    """Counts [N, E] of segments of independent tokens, and the share of tokens that select each expert [E]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_experts, generator=generator) + torch.randn(
        num_segments, num_tokens, num_experts, generator=generator
    )
    is_selected = torch.zeros_like(logits).scatter(-1, logits.topk(num_slots).indices, 1.0)
    return is_selected.sum(dim=1), is_selected.mean(dim=(0, 1))


def test_counts_are_binomial():
    [probabilities] = count_probabilities(3, torch.tensor([0.25])).tolist()

    assert probabilities == pytest.approx([27 / 64, 27 / 64, 9 / 64, 1 / 64])


def test_experts_that_are_always_or_never_selected_have_certain_counts():
    assert count_probabilities(2, torch.tensor([0.0, 1.0])).tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_long_segments_have_probabilities_too():
    probabilities = count_probabilities(1000, torch.tensor([0.01, 0.5, 0.99]))

    assert probabilities.sum(dim=-1).tolist() == pytest.approx([1.0] * 3, abs=1e-9)
    assert (probabilities @ torch.arange(1001.0).double()).tolist() == pytest.approx([10.0, 500.0, 990.0])


def test_the_bound_of_one_expert_a_token_by_hand():
    """Two tokens, two experts: the largest count is 2 or 1, each half of the time; t = 1 gives 1 + 2 * 1/4."""
    outcomes = [max(outcome.count(0), outcome.count(1)) for outcome in itertools.product((0, 1), repeat=2)]

    assert sum(outcomes) / len(outcomes) == 1.5
    assert largest_counts_bound(2, torch.tensor([0.5, 0.5]), 1) == pytest.approx(1.5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_bound_is_above_the_mean_over_all_outcomes(size):
    shares, num_tokens = (0.2, 0.5, 0.3), 6
    mean = sum(
        math.prod(shares[expert] for expert in outcome)
        * sum(sorted((outcome.count(expert) for expert in range(3)), reverse=True)[:size])
        for outcome in itertools.product(range(3), repeat=num_tokens)
    )

    bound = largest_counts_bound(num_tokens, torch.tensor(shares), size)

    assert mean - 1e-6 <= bound <= 1.07 * mean
    if size == 3:
        assert bound == pytest.approx(mean)


@pytest.mark.parametrize(("num_experts", "num_slots", "size"), [(8, 2, 4), (8, 2, 1), (16, 4, 8)])
def test_the_bound_is_close_to_what_independent_tokens_do(num_experts, num_slots, size):
    """Experts of a token exclude each other here, which the bound does not know."""
    counts, shares = _uneven_top_k(3000, 16, num_experts, num_slots)
    mean = counts.topk(size).values.sum(dim=-1).mean().item()

    bound = largest_counts_bound(16, shares, size)

    assert mean * 0.999 <= bound <= mean * 1.05


@pytest.mark.parametrize(("num_experts", "num_slots", "num_tokens"), [(64, 1, 16), (128, 1, 16), (128, 2, 4)])
def test_the_bound_is_within_14_per_cent_where_many_experts_have_few_tokens(num_experts, num_slots, num_tokens):
    """One count of many is the hardest to bound; even loads are the worst where a token has one expert."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1000, num_tokens, num_experts, generator=generator)
    counts = torch.zeros_like(scores).scatter(-1, scores.topk(num_slots).indices, 1.0).sum(dim=1)
    mean = counts.amax(dim=-1).mean().item()

    bound = largest_counts_bound(num_tokens, torch.full((num_experts,), num_slots / num_experts), 1)

    assert mean * 0.99 <= bound <= mean * 1.15
