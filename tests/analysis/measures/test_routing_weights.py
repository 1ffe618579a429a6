"""Mean routing weights by domain, their unevenness, and how they differ between domains."""

import math
from statistics import fmean, pstdev

import pytest
import torch
from routed import measured, random_tokens, routed, subject

from upcycled_moe.analysis.measures.routing_weights import RoutingWeights


def test_figures_by_hand():
    # Four tokens of one domain and one of the other, whose weights sum to a half: both domains count equally.
    first = routed(0, [[0, 1]] * 4, [[0.75, 0.25], [0.25, 0.75]] * 2, torch.zeros(4, 4))
    second = routed(1, [[2, 0]], [[0.25, 0.25]], torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log())

    result = measured(RoutingWeights, subject(2, 4), first, second)

    assert result.tables["weights"] == [[[0.5, 0.5, 0.0, 0.0], [0.25, 0.0, 0.25, 0.0]]]
    assert result.tables["probabilities"][0][0] == pytest.approx([0.25] * 4)
    assert result.tables["probabilities"][0][1] == pytest.approx([0.5, 0.25, 0.125, 0.125])
    assert result.per_layer["routing_diversity"] == pytest.approx([1.0])
    assert result.per_layer["weight_range"] == pytest.approx([0.5])
    # Entropies: 1.5 ln 2 of the mixture (1/2, 1/4, 1/4, 0), ln 2 of each domain.
    assert result.per_layer["domain_divergence"] == pytest.approx([0.5])


def _naive(batches, num_experts):
    """Figures token for token, in plain Python."""
    weights, shares = [], []
    for batch in batches:
        sums = [0.0] * num_experts
        for experts, of_token in zip(batch.selected.tolist(), batch.weights.tolist(), strict=True):
            for expert, weight in zip(experts, of_token, strict=True):
                if expert < num_experts:
                    sums[expert] += weight
        weights.append([total / len(batch.selected) for total in sums])
        shares.append([total / sum(sums) for total in sums])

    def entropy(distribution):
        return -sum(share * math.log(share) for share in distribution if share)

    mixture = [fmean(of_domains) for of_domains in zip(*shares, strict=True)]
    return weights, {
        "routing_diversity": fmean(pstdev(row) / fmean(row) for row in weights),
        "weight_range": fmean(max(row) - min(row) for row in shares),
        "domain_divergence": (entropy(mixture) - fmean(map(entropy, shares)))
        / math.log(min(len(batches), num_experts)),
        "domain_divergence_by_load": _naive_chance(batches, weights, num_experts),
    }


def _naive_chance(batches, weights, num_experts):
    """The variance of each expert's share of the weight, token for token; domains count equally."""
    mean = [fmean(of_domains) for of_domains in zip(*weights, strict=True)]
    total, spread = sum(mean), 0.0
    for expert in range(num_experts):
        share = mean[expert] / total
        squares = []
        for batch in batches:
            of_tokens = [
                sum(w for e, w in zip(experts, row, strict=True) if e == expert) - share * sum(row)
                for experts, row in zip(batch.selected.tolist(), batch.weights.tolist(), strict=True)
            ]
            squares.append(fmean(value**2 for value in of_tokens))
        spread += fmean(squares) / total**2 / share if share else 0.0
    num_domains = len(batches)
    tokens = sum(1 / len(batch.selected) for batch in batches)
    return (num_domains - 1) * tokens * spread / (2 * num_domains**2 * math.log(min(num_domains, num_experts)))


@pytest.mark.parametrize("num_experts", [4, 9])
@pytest.mark.parametrize("num_top", [1, 3])
@pytest.mark.parametrize("unused", [0, 1])
def test_figures_equal_the_naive_count(num_experts, num_top, unused):
    batches = [random_tokens(d, 30 + 20 * d, num_experts, num_top, seed=d, unused=unused) for d in range(5)]

    result = measured(RoutingWeights, subject(5, num_experts, num_top), *batches)

    weights, figures = _naive(batches, num_experts)
    torch.testing.assert_close(torch.tensor(result.tables["weights"][0]), torch.tensor(weights))
    assert {name: values[0] for name, values in result.per_layer.items()} == pytest.approx(figures, rel=1e-6)


@pytest.mark.parametrize(
    ("num_experts", "num_top", "scaled", "times"), [(8, 1, True, 200), (8, 2, True, 200), (64, 8, False, 20)]
)
def test_domains_that_route_alike_diverge_as_the_loads_say(num_experts, num_top, scaled, times):
    generator = torch.Generator().manual_seed(0)
    preference = 0.7 * torch.randn(num_experts, generator=generator)
    figures = []
    for _ in range(times):
        batches = []
        for domain, num_tokens in enumerate((100, 200, 400)):
            logits = preference + torch.randn(num_tokens, num_experts, generator=generator)
            weights, selected = logits.softmax(dim=-1).topk(num_top)
            weights = weights / weights.sum(dim=-1, keepdim=True) if scaled else weights
            batches.append(routed(domain, selected.tolist(), weights.tolist(), logits))
        figures.append(measured(RoutingWeights, subject(3, num_experts, num_top), *batches).per_layer)

    divergence, chance = (
        fmean(each[name][0] for each in figures) for name in ("domain_divergence", "domain_divergence_by_load")
    )
    assert divergence == pytest.approx(chance, rel=0.1)


def test_chance_of_one_expert_a_token_is_known():
    tokens = 100
    batches = [routed(d, [[t % 5] for t in range(tokens)], [[1.0]] * tokens, torch.zeros(tokens, 5)) for d in range(3)]

    figures = measured(RoutingWeights, subject(3, 5, 1), *batches).per_layer

    expected = (3 - 1) * (5 - 1) / (2 * 3 * tokens * math.log(3))
    assert figures["domain_divergence_by_load"] == [pytest.approx(expected)]


@pytest.mark.parametrize("seen", [(), (0,), (0, 2)])
def test_domains_without_weight_are_left_out_of_chance(seen):
    """One token to one expert each in every domain that is seen: none, one or two of three."""
    batches = [routed(d, [[d], [1]], [[1.0], [1.0]], torch.zeros(2, 4)) for d in seen]
    batches.append(routed(1, [[4]], [[0.0]], torch.zeros(1, 4)))

    [chance] = measured(RoutingWeights, subject(3, 4, 1), *batches).per_layer["domain_divergence_by_load"]

    if len(seen) < 2:
        assert chance is None
    else:
        assert chance == pytest.approx((2 - 1) * (3 - 1) / (2 * 4 * math.log(2)))


def test_specialisation_diverges_and_collapse_does_not():
    def figures(*experts):
        batches = [routed(domain, [[expert]], [[1.0]], torch.zeros(1, 4)) for domain, expert in enumerate(experts)]
        return measured(RoutingWeights, subject(len(experts), 4, 1), *batches).per_layer

    specialised, collapsed = figures(0, 1, 2), figures(3, 3, 3)

    assert specialised["routing_diversity"] == collapsed["routing_diversity"] == pytest.approx([math.sqrt(3)])
    assert specialised["domain_divergence"] == pytest.approx([1.0])
    assert collapsed["domain_divergence"] == pytest.approx([0.0])
    # More domains than experts: each expert to itself is still the most.
    assert figures(0, 1, 2, 3, 0, 1, 2, 3)["domain_divergence"] == pytest.approx([1.0])
