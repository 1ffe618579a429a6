"""The figures of routers and their loads, over domains."""

import math

import pytest
import torch
from routed import measured, random_tokens, routed, subject

from upcycled_moe.analysis.measures.routing import Routing


def test_figures_by_hand():
    sure = routed(0, [[0, 1]], [[0.5, 0.25]], torch.tensor([[0.5, 0.25, 0.25]]).log())
    undecided = routed(1, [[0, 3]], [[0.3, 0.0]], torch.zeros(1, 3))

    result = measured(Routing, subject(2, 3), sure, undecided)

    expected = {
        "entropy": (1.5 * math.log(2) + math.log(3)) / 2,
        "load_entropy": math.log(3) - math.log(4) / 3,
        "max_violation": 1.0,
        "dead_experts": 1,
        "experts_per_token": 1.5,
        "logit_std": math.sqrt(math.log(2) ** 2 * 2 / 9 / 2),
    }
    assert {name: values[0] for name, values in result.per_layer.items()} == pytest.approx(expected)
    assert result.tables["load"][0] == pytest.approx([2 / 3, 1 / 3, 0])
    assert result.tables["domain_load"][0] == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]


def test_loads_count_every_filled_slot():
    batches = [random_tokens(domain, 40, 5, 2, seed=domain, unused=1) for domain in (0, 1)]

    result = measured(Routing, subject(2, 5), *batches)

    counts = [[0] * 5, [0] * 5]
    for batch in batches:
        for experts in batch.selected.tolist():
            for expert in experts:
                if expert < 5:
                    counts[batch.domain][expert] += 1
    pooled = [sum(of_domains) for of_domains in zip(*counts, strict=True)]
    assert result.tables["load"][0] == pytest.approx([count / sum(pooled) for count in pooled])
    for load, count in zip(result.tables["domain_load"][0], counts, strict=True):
        assert load == pytest.approx([each / sum(count) for each in count])
    assert result.per_layer["dead_experts"] == [1]


def test_layers_are_counted_apart():
    first, second = (random_tokens(0, 30, 4, 2, seed=seed) for seed in (0, 1))
    both = Routing(subject(1, 4, num_layers=2))
    both.update(1, second)
    both.update(0, first)

    result = both.result()

    for number, tokens in enumerate((first, second)):
        alone = measured(Routing, subject(1, 4), tokens)
        assert {name: values[number] for name, values in result.per_layer.items()} == {
            name: values[0] for name, values in alone.per_layer.items()
        }
        assert result.tables["load"][number] == alone.tables["load"][0]
