"""Means over seeds with confidence intervals, and paired differences."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


# 97.5 % quantiles of Student's t distribution for 1, 2, ... degrees of freedom.
T_QUANTILES = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)
MAX_SEEDS = len(T_QUANTILES) + 1


@dataclass(frozen=True)
class Interval:
    """A mean and half the width of its 95 % confidence interval; None for a single value, which has none."""

    mean: float
    half_width: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval is on one side of zero."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of `values`, which are taken as draws from one normal distribution, and its interval.

    Source: Student (1908): mean ± t · s / sqrt(n), with the standard deviation s of n - 1 degrees of freedom.
    """
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, None)
    quantile = T_QUANTILES[len(values) - 2]
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)))


def p_value(values: Sequence[float]) -> float | None:
    """Return how likely a mean at least as far from zero is, were the true one zero; None for a single value.

    Source: Student's t-test with n - 1 degrees of freedom, two-sided; the distribution in closed form, Abramowitz and
    Stegun (1964), 26.7.3 and 26.7.4.
    """
    if len(values) == 1:
        return None
    spread = statistics.stdev(values) / math.sqrt(len(values))
    if spread == 0:
        return float(statistics.fmean(values) == 0)
    degrees = len(values) - 1
    angle = math.atan(abs(statistics.fmean(values)) / spread / math.sqrt(degrees))
    term, total = (math.cos(angle), 0.0) if degrees % 2 else (1.0, 0.0)
    for number in range(1 + degrees % 2, degrees, 2):
        total += term
        term *= number / (number + 1) * math.cos(angle) ** 2
    if degrees % 2:
        return 1 - 2 / math.pi * (angle + math.sin(angle) * total)
    return 1 - math.sin(angle) * total


def holm(p_values: Sequence[float]) -> list[float]:
    """Return `p_values` corrected for how many there are.

    Source: Holm (1979), A simple sequentially rejective multiple test procedure.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    for rank, number in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[number]))
        corrected[number] = largest
    return corrected


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Return the mean over seeds of `values - baseline` and its interval; both are by seed.

    Runs of one seed see the same text in the same order, so what that order does to both drops out.

    Raises:
        ValueError: if they are of different seeds.
    """
    if values.keys() != baseline.keys():
        raise ValueError(f"seeds differ: {sorted(values)} and {sorted(baseline)}.")
    return mean_interval([values[seed] - baseline[seed] for seed in values])
