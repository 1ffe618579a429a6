"""What happens to gold as a reward model is optimised: its curve, the drop from the peak, differences of two models.

Dimensions: S seeds, P prompts, N responses to each, C numbers of responses to choose from, B resamples of the prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .bootstrap import ROUNDING, Interval, interval_of_largest, percentile_interval, seed_errors
from .curves import best_of_n, standardized


@dataclass(frozen=True)
class Curve:
    """Means over prompts for each number of responses to choose from [C], with the ends of their intervals."""

    values: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Figures:
    """What a curve says, in standard deviations of gold within prompts, and how good its scores are.

    Args:
        gold_at_peak: the most that gold reaches; zero is what the policy gets without a choice.
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
class RiseAndFall:
    """What is certain of a curve of gold.

    Args:
        rise_interval: of `figures.gold_at_peak`, valid for whichever n is the peak.
        drop_interval: of `figures.drop`, valid likewise.
        end_interval: of `figures.gold_at_end`.
    """

    rise_interval: Interval
    drop_interval: Interval
    end_interval: Interval

    @property
    def overoptimizes(self) -> bool:
        """Whether gold first rises and then falls for certain: both intervals are above zero.

        Gold that only falls belongs to a reward model that is wrong from the start, however little it is optimised.
        """
        return self.rise_interval.low > 0 and self.drop_interval.low > 0

    @property
    def is_worse_than_no_choice(self) -> bool:
        """Whether gold is not shown to rise, and at N is below what the policy gets by itself for certain."""
        return self.rise_interval.low <= 0 and self.end_interval.high < -ROUNDING


@dataclass(frozen=True)
class SeedResult(RiseAndFall):
    """One reward model by itself: its curves [C] and figures."""

    gold: list[float]
    proxy: list[float]
    figures: Figures


@dataclass(frozen=True)
class ModelResult(RiseAndFall):
    """A reward model, or several seeds of one: the curves of their mean, and each by itself.

    Args:
        gold_per_prompt: of each seed [S, P, C], for differences to other models.
    """

    gold: Curve
    proxy: Curve
    figures: Figures
    seeds: list[SeedResult]
    gold_per_prompt: np.ndarray


@dataclass(frozen=True)
class Difference:
    """A figure of one model less that of the baseline, over the same resamples of the prompts."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """What differs from the baseline. The peaks are those of the whole table in each resample.

    Args:
        over_seeds: whether intervals tell what other seeds would have given, not other prompts only: both models have
            several.
    """

    gold_at_peak: Difference
    gold_at_end: Difference
    drop: Difference
    over_seeds: bool


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
            **_intervals(by_gold, weights),
        )
        for by_gold, by_proxy, agreement in zip(gold_curves, proxy_curves, agreements, strict=True)
    ]
    per_prompt, proxy_per_prompt = gold_curves.mean(axis=0), proxy_curves.mean(axis=0)  # [P, C]
    agreement = map(_mean, zip(*agreements, strict=True))
    return ModelResult(
        gold=_curve(per_prompt, weights),
        proxy=_curve(proxy_per_prompt, weights),
        figures=_figures(per_prompt.mean(axis=0), proxy_per_prompt.mean(axis=0), numbers, oracle, *agreement),
        seeds=seeds,
        gold_per_prompt=gold_curves,
        **_intervals(per_prompt, weights),
    )


def compare(
    model: ModelResult, baseline: ModelResult, weights: np.ndarray, generator: np.random.Generator
) -> Comparison:
    """Return how `model` differs from `baseline`, with intervals that are paired by prompt.

    Args:
        weights: of the prompts in each resample [B, P], as the two were measured.
        generator: of the errors of seeds, which are in the intervals where both models have several.
    """
    over_seeds = min(len(one.gold_per_prompt) for one in (model, baseline)) > 1
    at_peak, other_at_peak = (one.gold_per_prompt[..., _peak(one.gold.values)] for one in (model, baseline))
    at_end, other_at_end = (one.gold_per_prompt[..., -1] for one in (model, baseline))

    def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
        per_prompt = ours.mean(axis=0) - theirs.mean(axis=0)
        resampled = weights @ per_prompt
        if over_seeds:
            resampled += seed_errors(ours.mean(axis=1), theirs.mean(axis=1), len(resampled), generator)
        return Difference(float(per_prompt.mean()), percentile_interval(resampled))

    return Comparison(
        gold_at_peak=difference(at_peak, other_at_peak),
        gold_at_end=difference(at_end, other_at_end),
        drop=difference(at_peak - at_end, other_at_peak - other_at_end),
        over_seeds=over_seeds,
    )


def _intervals(per_prompt: np.ndarray, weights: np.ndarray) -> dict[str, Interval]:
    falls = per_prompt - per_prompt[:, -1:]
    return {
        "rise_interval": interval_of_largest(per_prompt.mean(axis=0), weights @ per_prompt),
        "drop_interval": interval_of_largest(falls.mean(axis=0), weights @ falls),
        "end_interval": percentile_interval(weights @ per_prompt[:, -1]),
    }


def _peak(gold: Sequence[float]) -> int:
    """Return where gold [C] is largest, first of those that differ by rounding only."""
    return int(np.argmax(np.asarray(gold) >= np.max(gold) - ROUNDING))


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
    peak = _peak(gold)
    return Figures(
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
