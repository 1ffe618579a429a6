"""The share of a domain's tokens that select each expert, against even spreading."""

import pytest
import torch
from routed import measured, random_tokens, routed, subject

from upcycled_moe.analysis.measures.domains import DomainSpecialization


def test_figures_by_hand():
    first = routed(0, [[0, 1], [0, 2]], [[0.5, 0.5]] * 2, torch.zeros(2, 4))
    second = routed(1, [[0, 4], [4, 3]] * 3, [[1.0, 0.0], [0.0, 1.0]] * 3, torch.zeros(6, 4))

    result = measured(DomainSpecialization, subject(2, 4), first, second)

    assert result.tables["specialization"] == [[[1.0, 0.5, 0.5, 0.0], [0.5, 0.0, 0.0, 0.5]]]
    # The second domain fills one slot a token.
    assert result.tables["uniform"] == [[0.5, 0.25]]
    # Over even spreading: 2, 1, 1, 0 and 2, 0, 0, 2; the largest of each expert: 2, 1, 1, 2.
    assert result.per_layer["domain_specialization"] == pytest.approx([1.5])
    assert result.per_layer["largest_specialization"] == pytest.approx([2.0])


def test_uneven_but_alike_is_no_specialisation():
    batches = [routed(domain, [[0], [0], [1]], [[1.0]] * 3, torch.zeros(3, 4)) for domain in range(3)]

    result = measured(DomainSpecialization, subject(3, 4, 1), *batches)

    assert result.per_layer["domain_specialization"] == pytest.approx([1.0])
    assert result.per_layer["largest_specialization"] == pytest.approx([4 * 2 / 3])


def test_one_domain_has_no_other_to_specialise_against():
    result = measured(DomainSpecialization, subject(1, 4, 1), routed(0, [[0], [1]], [[1.0]] * 2, torch.zeros(2, 4)))

    assert result.per_layer == {"domain_specialization": [None], "largest_specialization": [2.0]}
    assert len(result.notes) == 1


@pytest.mark.parametrize("num_top", [1, 3])
def test_figures_equal_the_naive_count(num_top):
    num_experts = 6
    batches = [random_tokens(domain, 25 + 30 * domain, num_experts, num_top, domain, unused=1) for domain in range(4)]

    result = measured(DomainSpecialization, subject(4, num_experts, num_top), *batches)

    shares = [
        [sum(expert in experts for experts in batch.selected.tolist()) / len(batch.selected) for expert in range(6)]
        for batch in batches
    ]
    ratios = [[share / (sum(of_domain) / num_experts) for share in of_domain] for of_domain in shares]
    torch.testing.assert_close(torch.tensor(result.tables["specialization"][0]), torch.tensor(shares))
    assert result.per_layer["domain_specialization"] == pytest.approx(
        [sum(max(of_domains) for of_domains in zip(*ratios, strict=True)) / num_experts]
    )
    assert result.per_layer["largest_specialization"] == pytest.approx([max(map(max, ratios))])
