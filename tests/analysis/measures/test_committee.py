"""The standing committee: experts that lead in nearly all domains."""

from itertools import combinations
from statistics import fmean, pvariance

import pytest
import torch
from routed import measured, random_tokens, routed, subject

from upcycled_moe.analysis.measures.committee import StandingCommittee, audit, expected_overlap


def _domains(*experts_and_weights, num_experts):
    """One token a domain, so that its weights are the means."""
    return [
        routed(domain, [experts], [weights], torch.zeros(1, num_experts))
        for domain, (experts, weights) in enumerate(experts_and_weights)
    ]


def test_figures_by_hand():
    usual, other = ([0, 1, 2], [0.5, 0.3, 0.2]), ([2, 1, 3], [0.5, 0.3, 0.2])
    batches = _domains(usual, usual, usual, usual, other, num_experts=6)

    result = measured(StandingCommittee, subject(5, 6, 3), *batches)

    # Ranks: 0 has 1 1 1 1 4, 1 has 2 2 2 2 2, 2 has 3 3 3 3 1; 3 stands in one domain only. Mean and variance are
    # (1.6, 1.44), (2, 0), (2.6, 0.64): 1 beats 2 in both.
    assert result.tables["presence"] == [[pytest.approx(share) for share in (0.8, 1, 1, 0.2, 0, 0)]]
    assert result.tables["committee"] == [[1, 1, 0, 0, 0, 0]]
    figures = {name: values[0] for name, values in result.per_layer.items()}
    assert figures == pytest.approx(
        {
            "top_overlap": (6 * 1 + 4 * 2 / 4) / 10,
            "gini": 0.6,
            "standing_experts": 3,
            "standing_coverage": (4 * 1.0 + 0.8) / 5,
            "committee_size": 2,
            "committee_coverage": (4 * 0.8 + 0.3) / 5,
            "committee_density": (0.7 / 2) / (0.3 / 4),
        }
    )


@pytest.mark.parametrize(("num_present", "num_standing"), [(8, 1), (7, 0)])
def test_experts_stand_from_80_per_cent_of_the_domains(num_present, num_standing):
    """Of ten domains; in the others each has an expert of its own."""
    batches = _domains(*[([0] if domain < num_present else [domain], [1.0]) for domain in range(10)], num_experts=10)

    result = measured(StandingCommittee, subject(10, 10, 1), *batches)

    assert result.per_layer["standing_experts"] == [num_standing]


def _naive(weights, num_top):
    """Figures in plain Python from the mean weights [D][E]."""
    num_domains, num_experts = len(weights), len(weights[0])
    shares = [[weight / sum(row) for weight in row] for row in weights]
    ranks = {expert: [] for expert in range(num_experts)}
    tops = []
    for row in shares:
        top = [e for e in sorted(range(num_experts), key=lambda e: -row[e])[:num_top] if row[e] > 0]
        tops.append(set(top))
        for expert in ranks:
            ranks[expert].append(top.index(expert) + 1 if expert in top else num_top + 1)
    standing = [e for e in ranks if sum(rank <= num_top for rank in ranks[e]) * 5 >= num_domains * 4]
    points = {e: (sum(ranks[e]), round(pvariance(ranks[e]), 9)) for e in standing}
    members = [
        e
        for e in standing
        if not any(p[0] <= points[e][0] and p[1] <= points[e][1] and p != points[e] for p in points.values())
    ]
    coverage = fmean(sum(row[e] for e in members) for row in shares)
    return members, {
        "top_overlap": fmean(len(a & b) / len(a | b) for a, b in combinations(tops, 2)),
        "gini": fmean(sum(abs(a - b) for a in row for b in row) / (2 * num_experts) for row in shares),
        "standing_experts": len(standing),
        "standing_coverage": fmean(sum(row[e] for e in standing) for row in shares),
        "committee_size": len(members),
        "committee_coverage": coverage,
        "committee_density": (coverage / len(members)) / ((1 - coverage) / (num_experts - len(members)))
        if members
        else None,
    }


@pytest.mark.parametrize("num_top", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_figures_equal_the_naive_count(num_top, seed):
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(10, generator=generator) * 3
    logits = torch.randn(6, 10, generator=generator) + bias
    weights = logits.softmax(dim=-1).double() * 0.7
    weights[:, 9] = 0

    found = audit(weights, num_top)

    members, figures = _naive(weights.tolist(), num_top)
    assert found.committee.nonzero().flatten().tolist() == members
    assert {name: getattr(found, name) for name in figures} == pytest.approx(figures)


def test_tokens_without_some_experts_equal_the_naive_count():
    batches = [random_tokens(domain, 30 + 10 * domain, 8, 2, seed=domain % 2, unused=2) for domain in range(5)]

    result = measured(StandingCommittee, subject(5, 8), *batches)

    weights = [
        [batch.weights[batch.selected == expert].sum().item() / len(batch.selected) for expert in range(8)]
        for batch in batches
    ]
    members, figures = _naive(weights, 2)
    assert [expert for expert in range(8) if result.tables["committee"][0][expert]] == members
    assert {name: values[0] for name, values in result.per_layer.items()} == pytest.approx(figures, rel=1e-6)


@pytest.mark.parametrize(
    ("best_by_domain", "members"),
    [
        pytest.param(["012", "120", "201", "021", "102", "210"], "012", id="the same ranks in any order"),
        pytest.param(["102", "201"], "0", id="the same mean, and steadier"),
        pytest.param(["91", "91", "91", "91", "12"], "19", id="beyond the top the rank is K + 1, however far"),
        # 0 has 1 4 4 4 5, mean 3.6, variance 1.84; 1 has 3 3 2 5 5, the same mean, 1.44, in three domains only.
        pytest.param(["0213", "4510", "6170", "89a0", "bcde"], "0", id="only standing experts beat one"),
    ],
)
def test_committee_is_the_pareto_front_of_ranks(best_by_domain, members):
    weights = torch.full((len(best_by_domain), 16), 0.01, dtype=torch.float64)
    for domain, best in enumerate(best_by_domain):
        for place, expert in enumerate(best):
            weights[domain, int(expert, 16)] = 1.0 - 0.1 * place

    found = audit(weights, num_top=len(best_by_domain[0]))

    assert found.committee.nonzero().flatten().tolist() == [int(expert, 16) for expert in members]


def test_a_committee_with_all_weight_has_no_density():
    alone = ([0, 4], [1.0, 0.0])

    figures = measured(StandingCommittee, subject(2, 4), *_domains(alone, alone, num_experts=4)).per_layer

    assert figures["standing_experts"] == figures["committee_size"] == [1]
    assert figures["committee_coverage"] == [1.0]
    assert figures["committee_density"] == [None]


def test_without_a_choice_there_is_no_committee():
    same = ([0, 1], [0.6, 0.4])

    everything = measured(StandingCommittee, subject(2, 2), *_domains(same, same, num_experts=2))
    one_domain = measured(StandingCommittee, subject(1, 4), *_domains(same, num_experts=4))

    for result in (everything, one_domain):
        assert {name for name, values in result.per_layer.items() if values != [None]} == {"gini"}
        assert len(result.notes) == 1


def test_overlap_of_random_groups():
    # 2 of 8: 12/28 share one of three, 1/28 share both.
    assert expected_overlap(2, 8) == pytest.approx(12 / 28 / 3 + 1 / 28)
    groups = list(combinations(range(7), 3))
    pairs = [len({*a} & {*b}) / len({*a} | {*b}) for a in groups for b in groups]
    assert expected_overlap(3, 7) == pytest.approx(fmean(pairs))
