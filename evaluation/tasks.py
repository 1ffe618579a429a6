"""The tasks of the Router Upcycling paper, the figure that each is known by, and how its averages are made up."""

import math
from collections.abc import Collection, Mapping, Sequence

from .results import Average, Score


PAPER_GROUP = "router_upcycling"

# The paper's text names the first group only; the others are the one split of its tasks for which the averages in all
# columns of its Table 1 follow from the rows.
ABILITIES = {
    "Understanding": ("openbookqa", "openbookqa_fact"),
    "Reasoning": ("arc_challenge", "arc_easy", "hellaswag", "winogrande"),
    "Knowledge": ("boolq", "copa", "nq_open", "triviaqa"),
}
PAPER_TASKS = tuple(task for tasks in ABILITIES.values() for task in tasks)
OVERALL = "Average"

# Figures between 0 and 1 of which a mean over tasks makes sense, in order of preference.
ACCURACIES = ("acc_norm", "acc", "exact_match")
# Where a task reports both accuracies, the one it is usually quoted by; the paper does not say which it takes.
_USUAL_METRICS = {"arc_easy": "acc"}


def headline_metric(task: str, metrics: Collection[str]) -> str:
    """Return which of `metrics` stands for `task` in tables and averages."""
    preferred = (_USUAL_METRICS.get(task), *ACCURACIES)
    return next((metric for metric in preferred if metric in metrics), next(iter(metrics)))


def average_score(scores: Collection[Score]) -> Score:
    """Return the mean of the scores of tasks, each counting the same, and its standard error.

    `se = √(Σ se_t²) / n`: the items of different tasks are independent.

    Source: Table 1 of Router Upcycling (arXiv 2509.00679) for the mean; the error is ours.
    """
    mean = sum(score.value for score in scores) / len(scores)
    errors = [score.stderr for score in scores]
    if None in errors:
        return Score(mean, None)
    return Score(mean, math.sqrt(sum(error**2 for error in errors)) / len(scores))


def averages(headlines: Mapping[str, Score]) -> dict[str, Average]:
    """Return the averages over `headlines`, accuracies by task: one an ability of the paper, and one over all.

    Where only some tasks of an average are there, it is over these, and names the others. An ability with no task is
    left out, and all are where other tasks than the paper's are there.
    """
    if not set(headlines) <= set(PAPER_TASKS):
        return {OVERALL: _average(headlines, tuple(headlines))}
    groups = ABILITIES | {OVERALL: PAPER_TASKS}
    return {
        name: _average(headlines, tasks) for name, tasks in groups.items() if not headlines.keys().isdisjoint(tasks)
    }


def _average(headlines: Mapping[str, Score], tasks: Sequence[str]) -> Average:
    present = [task for task in tasks if task in headlines]
    missing = [task for task in tasks if task not in headlines]
    return Average(average_score([headlines[task] for task in present]), present, missing)
