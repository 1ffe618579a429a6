"""How much two checkpoints differ, item by item and block by block."""

import math
import statistics
from collections.abc import Mapping, Sequence

from ..common.domain_loss import DomainLoss
from ..common.perplexity import TextLosses, domain_loss
from .results import Average, Score
from .tasks import average_score


def item_difference(items: Sequence[float], first: Sequence[float]) -> Score:
    """Return the mean of `items` less `first`, the scores of the same items by two checkpoints.

    `se = s / √n`, with the sample's standard deviation `s` of the `n` differences.

    Source: Miller, Adding Error Bars to Evals (arXiv 2411.00640), its analysis of paired differences.
    """
    differences = [one - other for one, other in zip(items, first, strict=True)]
    count = len(differences)
    stderr = statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
    return Score(statistics.fmean(differences), stderr)


def average_differences(averages: Mapping[str, Average], tasks: Mapping[str, Score]) -> dict[str, Score]:
    """Return the mean difference over the tasks of each average; see `average_score` for its error."""
    return {
        name: average_score([tasks[task] for task in average.tasks])
        for name, average in averages.items()
        if tasks.keys() >= set(average.tasks)
    }


def text_difference(text: TextLosses, first: TextLosses, same_tokens: bool) -> Score | None:
    """Return the difference of two losses on the same text in bits per byte; None without bytes.

    Where both read the `same_tokens`, its error is that of the mean of the differences block by block; see
    `domain_loss`.
    """
    one, other = text.mean(), first.mean()
    if one.bits_per_byte is None or other.bits_per_byte is None:
        return None
    value = one.bits_per_byte - other.bits_per_byte
    if not same_tokens:
        return Score(value, None)
    stderr = domain_loss(text.losses - first.losses, text.counts, text.num_bytes).stderr
    return Score(value, None if stderr is None else stderr * _bits_per_byte_of_a_nat(one))


def _bits_per_byte_of_a_nat(loss: DomainLoss) -> float:
    return loss.num_tokens / math.log(2) / loss.num_bytes
