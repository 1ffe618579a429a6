"""What happens to gold as a reward model is optimised: its curve, the drop from the peak, differences of two models.

Dimensions: S seeds, P prompts, N responses to each, C numbers of responses to choose from, B resamples of the prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .bootstrap import Interval, interval_of_largest, percentile_interval
from .curves import best_of_n, standardized


@dataclass(frozen=True)
class Curve:
    """Means over prompts for each number of responses to choose from [C], with the ends of their intervals."""

    values: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Figures:
    """What a curve says, in standard deviations of gold over the table, and how good its scores are.

    Args:
        gold_at_one: what the policy gets without a choice: zero, as gold is standardised.
        gold_at_peak: the most that gold reaches.
        peak: the n where it does; the smallest, if several.
        gold_at_end: gold with a choice among all N.
        drop: `gold_at_peak − gold_at_end`.
        regret: what gold's own choice among all N gets, less `gold_at_end`.
        goodhart_gap: how much further the proxy's own score rises from n = 1 to N than gold, each in its own standard
            deviations.
        drop_proxy_rise: how far the proxy's own score rises meanwhile, from the peak of gold to N.
        pairwise_accuracy: share of two responses to one prompt that the proxy orders as gold does, averaged over
            prompts; ties of the proxy count half, those of gold not at all. None where gold has ties only.
        correlation: of proxy and gold within prompts (Pearson); None where one of them is constant there.
    """

    gold_at_one: float
    gold_at_peak: float
    peak: int
    gold_at_end: float
    drop: float
    regret: float
    goodhart_gap: float
    drop_proxy_rise: float
    pairwise_accuracy: float | None
    correlation: float | None


@dataclass(frozen=True)
class SeedResult:
    """One reward model by itself: its curves [C], figures, and the interval of the drop."""

    gold: list[float]
    proxy: list[float]
    figures: Figures
    drop_interval: Interval

    @property
    def overoptimizes(self) -> bool:
        """Whether gold falls for certain: the interval of the drop is above zero."""
        return self.drop_interval.low > 0


@dataclass(frozen=True)
class ModelResult:
    """A reward model, or several seeds of one: the curves of their mean, and each by itself.

    Args:
        drop_interval: of `figures.drop`, valid for whichever n is the peak.
        gold_per_prompt: [P, C], for differences to other models.
    """

    gold: Curve
    proxy: Curve
    figures: Figures
    drop_interval: Interval
    seeds: list[SeedResult]
    gold_per_prompt: np.ndarray

    @property
    def overoptimizes(self) -> bool:
        """Whether gold falls for certain: the interval of the drop is above zero."""
        return self.drop_interval.low > 0


@dataclass(frozen=True)
class Difference:
    """A figure of one model less that of the baseline, over the same resamples of the prompts."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """What differs from the baseline. The peaks are those of the whole table in each resample."""

    gold_at_peak: Difference
    gold_at_end: Difference
    drop: Difference


def measure(scores: np.ndarray, gold: np.ndarray, numbers: Sequence[int], weights: np.ndarray) -> ModelResult:
    """Return what optimising a reward model does to gold.

    Args:
        scores: of each seed [S, P, N].
        gold: [P, N].
        numbers: of responses to choose from [C]; the last is N.
        weights: of the prompts in each resample [B, P].

    Raises:
        ValueError: if the curve does not begin at 1 and end at N.
    """
    if numbers[0] != 1 or numbers[-1] != gold.shape[1]:
        raise ValueError(f"a curve goes from 1 to {gold.shape[1]}, not from {numbers[0]} to {numbers[-1]}.")
    proxies, gold = [standardized(seed) for seed in scores], standardized(gold)
    gold_curves = np.stack([best_of_n(proxy, gold, numbers) for proxy in proxies])  # [S, P, C]
    proxy_curves = np.stack([best_of_n(proxy, proxy, numbers) for proxy in proxies])  # [S, P, C]
    oracle = float(gold.max(axis=1).mean())
    agreements = [(_pairwise_accuracy(proxy, gold), _correlation(proxy, gold)) for proxy in proxies]
    seeds = [
        SeedResult(
            gold=by_gold.mean(axis=0).tolist(),
            proxy=by_proxy.mean(axis=0).tolist(),
            figures=_figures(by_gold.mean(axis=0), by_proxy.mean(axis=0), numbers, oracle, *agreement),
            drop_interval=_drop_interval(by_gold, weights),
        )
        for by_gold, by_proxy, agreement in zip(gold_curves, proxy_curves, agreements, strict=True)
    ]
    per_prompt, proxy_per_prompt = gold_curves.mean(axis=0), proxy_curves.mean(axis=0)  # [P, C]
    agreement = map(_mean, zip(*agreements, strict=True))
    return ModelResult(
        gold=_curve(per_prompt, weights),
        proxy=_curve(proxy_per_prompt, weights),
        figures=_figures(per_prompt.mean(axis=0), proxy_per_prompt.mean(axis=0), numbers, oracle, *agreement),
        drop_interval=_drop_interval(per_prompt, weights),
        seeds=seeds,
        gold_per_prompt=per_prompt,
    )


def compare(model: ModelResult, baseline: ModelResult, weights: np.ndarray) -> Comparison:
    """Return how `model` differs from `baseline`, with paired intervals; `weights` [B, P] as they were measured."""
    peaks = [int(np.argmax(one.gold.values)) for one in (model, baseline)]
    at_peak, other_at_peak = (one.gold_per_prompt[:, peak] for one, peak in zip((model, baseline), peaks, strict=True))
    at_end, other_at_end = model.gold_per_prompt[:, -1], baseline.gold_per_prompt[:, -1]
    return Comparison(
        gold_at_peak=_difference(at_peak - other_at_peak, weights),
        gold_at_end=_difference(at_end - other_at_end, weights),
        drop=_difference((at_peak - at_end) - (other_at_peak - other_at_end), weights),
    )


def _drop_interval(per_prompt: np.ndarray, weights: np.ndarray) -> Interval:
    falls = per_prompt - per_prompt[:, -1:]
    return interval_of_largest(falls.mean(axis=0), weights @ falls)


def _difference(per_prompt: np.ndarray, weights: np.ndarray) -> Difference:
    return Difference(float(per_prompt.mean()), percentile_interval(weights @ per_prompt))


def _curve(per_prompt: np.ndarray, weights: np.ndarray) -> Curve:
    intervals = [percentile_interval(point) for point in (weights @ per_prompt).T]
    return Curve(
        values=per_prompt.mean(axis=0).tolist(),
        low=[interval.low for interval in intervals],
        high=[interval.high for interval in intervals],
    )


def _figures(
    gold: np.ndarray,
    proxy: np.ndarray,
    numbers: Sequence[int],
    oracle: float,
    pairwise_accuracy: float | None,
    correlation: float | None,
) -> Figures:
    peak = int(np.argmax(gold))
    return Figures(
        gold_at_one=float(gold[0]),
        gold_at_peak=float(gold[peak]),
        peak=numbers[peak],
        gold_at_end=float(gold[-1]),
        drop=float(gold[peak] - gold[-1]),
        regret=float(oracle - gold[-1]),
        goodhart_gap=float((proxy[-1] - proxy[0]) - (gold[-1] - gold[0])),
        drop_proxy_rise=float(proxy[-1] - proxy[peak]),
        pairwise_accuracy=pairwise_accuracy,
        correlation=correlation,
    )


def _pairwise_accuracy(proxy: np.ndarray, gold: np.ndarray) -> float | None:
    accuracies = []
    first, second = np.triu_indices(gold.shape[1], 1)
    for scores, values in zip(proxy, gold, strict=True):
        agreement = np.sign(scores[first] - scores[second]) * np.sign(values[first] - values[second])
        is_ordered = values[first] != values[second]
        if is_ordered.any():
            accuracies.append((1 + agreement[is_ordered].mean()) / 2)
    return float(np.mean(accuracies)) if accuracies else None


def _correlation(proxy: np.ndarray, gold: np.ndarray) -> float | None:
    scores, values = (table - table.mean(axis=1, keepdims=True) for table in (proxy, gold))
    scale = np.sqrt((scores**2).sum() * (values**2).sum())
    return float((scores * values).sum() / scale) if scale > 1e-12 * scores.size else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
