"""Sums over tokens are kept in double precision on the CPU, whatever the type of the model."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from moe_checkpoints import make_model
from routed import routed, subject

from upcycled_moe.analysis.measures import MEASURES, Subject
from upcycled_moe.analysis.measures.domain_means import DomainMeans, weight_sums
from upcycled_moe.common.moe_layers import find_moe_layers


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in `value`, in lists and objects of the project too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif not isinstance(value, Subject) and type(value).__module__.startswith("upcycled_moe."):
        yield from _tensors(list(vars(value).values()))


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_measures_sum_in_double_precision(measure):
    layers = find_moe_layers(make_model("linear").to(torch.bfloat16))

    sums = list(_tensors(measure(Subject(layers, ["text"], torch.device("cpu")))))

    assert sums or measure.name == "expert_weights"  # which sums over no tokens
    assert {each.dtype for each in sums if each.is_floating_point()} <= {torch.float64}


def test_large_sums_lose_nothing():
    """In float32 2**24 + 1 is 2**24, of weights that are float32 too."""
    tokens = routed(0, [[0]] * 4, [[2.0**24], [1.0], [1.0], [1.0]], torch.zeros(4, 2))
    means = DomainMeans(subject(1, 2))

    for sums in (weight_sums(tokens, 2), torch.ones(2)):
        means.add(0, tokens, sums)

    assert (means.means()[0, 0] * 8).tolist() == [2.0**24 + 4, 1.0]
