"""Intervals by drawing prompts anew: what would other prompts have given?

Dimensions: B resamples, P prompts, C points of a curve.
"""

from dataclasses import dataclass

import numpy as np


CONFIDENCE = 0.95


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
    # A mean without error is known, such as that of a difference to itself.
    varying = errors > 1e-12
    if not varying.any():
        largest = max(0.0, float(values.max(initial=0.0)))
        return Interval(largest, largest)
    deviations = np.abs(resampled - values)[:, varying] / errors[varying]
    half_widths = np.quantile(deviations.max(axis=1), CONFIDENCE) * errors * varying
    return Interval(*(max(0.0, float(ends.max())) for ends in (values - half_widths, values + half_widths)))
