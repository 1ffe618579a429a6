"""Intervals by drawing prompts anew: what would other prompts have given, and other seeds?

Dimensions: B resamples, P prompts, C points of a curve, S seeds.
"""

from dataclasses import dataclass

import numpy as np


CONFIDENCE = 0.95
# What differs by less is the same; scores are in standard deviations.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:+.3f}, {self.high:+.3f}]"


def resample_weights(num_prompts: int, num_resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return the weight of each prompt in each resample [B, P]; those of a resample sum to one.

    The same weights for all models make their differences paired.
    """
    return generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), num_resamples) / num_prompts


def percentile_interval(resampled: np.ndarray) -> Interval:
    """Return the interval between the percentiles of `resampled` [B] that leave the same out on both sides."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))


def seed_errors(
    ours: np.ndarray, theirs: np.ndarray, num_resamples: int, generator: np.random.Generator
) -> np.ndarray:
    """Return draws [B] of how far the difference of two means over seeds is off, to be added to resamples of prompts.

    Two or three seeds are too few to be drawn anew themselves: that would find too little spread, and none of its
    uncertainty. These are draws of Student's t, whose scale is the standard error of the difference.

    Args:
        ours: a value of each seed [S], two at least.
        theirs: those of the other model, whose seeds and number of seeds may be others.

    Source: Welch (1947), with the degrees of freedom of Satterthwaite. That the two errors add is our reading.
    """
    variances = [values.var(ddof=1) / len(values) for values in (ours, theirs)]
    if sum(variances) == 0:
        return np.zeros(num_resamples)
    shares = [variance / sum(variances) for variance in variances]
    freedom = 1 / sum(share**2 / (len(values) - 1) for share, values in zip(shares, (ours, theirs), strict=True))
    return np.sqrt(sum(variances)) * generator.standard_t(freedom, num_resamples)


def interval_of_largest(values: np.ndarray, resampled: np.ndarray) -> Interval:
    """Return an interval of the largest of several means, zero among them.

    The mean that turned out largest is so by luck in part, and its own interval would deny it. This one is made of
    intervals that hold all means at once: `mean_c ± t · s_c`, with the quantile `t` of the largest |deviation| / s_c.

    Args:
        values: the means [C].
        resampled: the same means in each resample [B, C].

    Source: the simultaneous ("sup-t") band of Montiel Olea and Plagborg-Møller (2019); that the largest lies between
    the largest lower and the largest upper end follows from it.
    """
    errors = resampled.std(axis=0)
    # A mean without error is known but for rounding, such as that of a difference to itself.
    varying = errors > ROUNDING
    values = np.where(varying, values, np.round(values, 12))
    if not varying.any():
        largest = max(0.0, float(values.max(initial=0.0)))
        return Interval(largest, largest)
    deviations = np.abs(resampled - values)[:, varying] / errors[varying]
    half_widths = np.quantile(deviations.max(axis=1), CONFIDENCE) * errors * varying
    return Interval(*(max(0.0, float(ends.max())) for ends in (values - half_widths, values + half_widths)))
