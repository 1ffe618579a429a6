import math
import statistics

import pytest
import torch

from upcycled_moe.common.perplexity import TextLosses
from upcycled_moe.evaluation.differences import average_differences, item_difference, text_difference
from upcycled_moe.evaluation.results import Average, Score


def losses(*values, num_bytes=40):
    return TextLosses(torch.tensor(values), torch.tensor([2, 4, 6]), num_bytes)


def test_items_are_compared_one_by_one():
    one, first = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]
    found = item_difference(one, first)
    assert found.value == pytest.approx(0.25)
    assert found.stderr == pytest.approx(statistics.stdev([0, 1, -1, 1]) / math.sqrt(4))
    assert item_difference(one, one) == Score(0, 0)
    assert item_difference([1.0], [0.0]) == Score(1, None)


def test_blocks_are_compared_one_by_one():
    # Half a nat a token everywhere: the blocks differ much, their differences do not.
    found = text_difference(losses(9.0, 3.0, 20.0), losses(8.0, 1.0, 17.0), same_tokens=True)
    assert found.value == pytest.approx(6 / math.log(2) / 40)
    assert found.stderr == pytest.approx(0, abs=1e-9)
    # Differences 2, 2, 2 over 2, 4, 6 targets: half a nat a token, off by 1, 0 and -1.
    found = text_difference(losses(10.0, 3.0, 19.0), losses(8.0, 1.0, 17.0), same_tokens=True)
    assert found.stderr == pytest.approx(math.sqrt(3 / 2 * (1 + 0 + 1)) / math.log(2) / 40)


def test_without_the_same_blocks_there_is_no_error():
    found = text_difference(losses(9.0, 3.0, 20.0), losses(8.0, 1.0, 17.0, num_bytes=20), same_tokens=False)
    assert found.value == pytest.approx((32 / 40 - 26 / 20) / math.log(2))
    assert found.stderr is None
    assert text_difference(losses(9.0, 3.0, 20.0, num_bytes=0), losses(8.0, 1.0, 17.0), same_tokens=True) is None


def test_differences_of_averages():
    tasks = {"boolq": Score(0.2, 0.03), "copa": Score(-0.1, 0.04)}
    averages = {
        "both": Average(Score(0.5, None), ["boolq", "copa"], []),
        "other": Average(Score(0.5, None), ["boolq", "piqa"], []),
    }
    found = average_differences(averages, tasks)
    assert list(found) == ["both"]
    assert (found["both"].value, found["both"].stderr) == pytest.approx((0.05, 0.025))
