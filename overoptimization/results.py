"""All models over one table, and what follows: does the baseline over-optimise, and does another model less?

Dimensions: S seeds, P prompts, N responses to each.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .bootstrap import CONFIDENCE, resample_weights
from .curves import kl_upper_bound, numbers_to_choose_from
from .measures import Comparison, ModelResult, compare, measure


# With fewer, the percentiles of a bootstrap are too near to each other.
FEW_PROMPTS = 50


@dataclass(frozen=True)
class Results:
    """The curves of all models over one table.

    Args:
        numbers: of responses to choose from.
        oracle: gold optimised for itself, which nothing exceeds.
        models: by name, in their order.
        comparisons: of each model but the baseline with it.
    """

    num_prompts: int
    numbers: list[int]
    oracle: ModelResult
    baseline: str
    models: dict[str, ModelResult]
    comparisons: dict[str, Comparison]

    @property
    def kl_upper_bounds(self) -> list[float]:
        """How far each choice can move the policy at most, in nats."""
        return [kl_upper_bound(n) for n in self.numbers]

    def reduces(self, name: str) -> bool:
        """Whether the model called `name` loses less than a baseline that over-optimises, for certain."""
        return self.models[self.baseline].overoptimizes and self.comparisons[name].drop.interval.high < 0

    def verdicts(self) -> list[str]:
        """Return what the curves say, in words: of the baseline first, then of each other model."""
        return [
            self._verdict_of_baseline(),
            *(self._verdict(name) for name in self.models if name != self.baseline),
            *self._warnings(),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything; it fits in JSON."""
        return {
            "numbers": self.numbers,
            "kl_upper_bounds": self.kl_upper_bounds,
            "confidence": CONFIDENCE,
            "baseline": self.baseline,
            "baseline_overoptimizes": self.models[self.baseline].overoptimizes,
            "oracle": asdict(self.oracle.gold),
            "models": {name: _model_dict(model) for name, model in self.models.items()},
            "comparisons": {
                name: {**asdict(comparison), "reduces_overoptimization": self.reduces(name)}
                for name, comparison in self.comparisons.items()
            },
            "verdicts": self.verdicts(),
        }

    def _verdict_of_baseline(self) -> str:
        baseline = self.models[self.baseline]
        drop = f"{_drop(baseline, self.numbers[-1])}{_seeds(baseline)}"
        if baseline.overoptimizes:
            return f"{self.baseline}, the baseline, over-optimises: {drop}."
        if baseline.is_worse_than_no_choice:
            return (
                f"{self.baseline}, the baseline, is worse than no choice: {drop}. It is wrong from the start, which "
                "is no over-optimisation that another model could reduce; look at its accuracy."
            )
        return (
            f"{self.baseline}, the baseline, does not over-optimise here: {drop}. There is nothing that another model "
            "could reduce; more responses or worse labels may bring it out."
        )

    def _verdict(self, name: str) -> str:
        model, comparison = self.models[name], self.comparisons[name]
        if not self.models[self.baseline].overoptimizes:
            outcome = "does not over-optimise either"
            if model.overoptimizes:
                outcome = "over-optimises"
            elif model.is_worse_than_no_choice:
                outcome = "is worse than no choice"
            return f"{name} {outcome}: {_drop(model, self.numbers[-1])}{_seeds(model)}."
        drop, at_end = comparison.drop, comparison.gold_at_end
        if self.reduces(name):
            outcome = f"loses less than {self.baseline}"
        elif drop.interval.low > 0:
            outcome = f"loses more than {self.baseline}"
        else:
            outcome = f"is not shown to lose less than {self.baseline}, or more"
        if not comparison.over_seeds:
            outcome += ", on these seeds"
        return (
            f"{name} {outcome}: its drop differs by {drop.value:+.3f} {drop.interval}, its gold at n = "
            f"{self.numbers[-1]} by {at_end.value:+.3f} {at_end.interval}."
        )

    def _warnings(self) -> list[str]:
        if self.num_prompts >= FEW_PROMPTS:
            return []
        return [f"Intervals from {self.num_prompts} prompts are too narrow; give {FEW_PROMPTS} or more."]


def measure_models(
    scores: Mapping[str, np.ndarray], gold: np.ndarray, *, baseline: str, num_resamples: int, seed: int
) -> Results:
    """Return the curves of all models and how they differ from the `baseline`; the same seed gives the same intervals.

    Args:
        scores: of each model by its name, one table for each of its seeds [S, P, N].
        gold: [P, N].
    """
    num_prompts, num_responses = gold.shape
    numbers = numbers_to_choose_from(num_responses)
    weights = resample_weights(num_prompts, num_resamples, np.random.default_rng(seed))
    models = {name: measure(tables, gold, numbers, weights) for name, tables in scores.items()}
    return Results(
        num_prompts=num_prompts,
        numbers=numbers,
        oracle=measure(gold[None], gold, numbers, weights),
        baseline=baseline,
        models=models,
        comparisons={
            # The same draws for all: a model more changes no other.
            name: compare(model, models[baseline], weights, np.random.default_rng([seed, 1]))
            for name, model in models.items()
            if name != baseline
        },
    )


def _drop(model: ModelResult, last: int) -> str:
    figures = model.figures
    if figures.peak == last:
        return f"gold still rises at n = {last}, to {figures.gold_at_end:+.3f}"
    fall = f"gold falls by {figures.drop:.3f} {model.drop_interval} from n = {figures.peak} to {last}"
    is_seen_to_rise = model.rise_interval.low > 0
    return fall if is_seen_to_rise else f"{fall} and is not shown to rise before"


def _seeds(model: ModelResult) -> str:
    """Return what several seeds do by themselves, which their mean may hide."""
    if len(model.seeds) == 1:
        return ""
    seeds = (
        f"; {sum(seed.overoptimizes for seed in model.seeds)} of {len(model.seeds)} seeds over-optimise by themselves"
    )
    if num_worse := sum(seed.is_worse_than_no_choice for seed in model.seeds):
        seeds += f", {num_worse} worse than no choice"
    return seeds


def _model_dict(model: ModelResult) -> dict[str, Any]:
    return {
        "overoptimizes": model.overoptimizes,
        "is_worse_than_no_choice": model.is_worse_than_no_choice,
        "figures": asdict(model.figures),
        "rise_interval": asdict(model.rise_interval),
        "drop_interval": asdict(model.drop_interval),
        "gold": asdict(model.gold),
        "proxy": asdict(model.proxy),
        "seeds": [asdict(seed) for seed in model.seeds],
    }
