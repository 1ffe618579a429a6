"""The tables of `upcycled-moe evaluate`: a row for each task or domain, a column for each checkpoint."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..common.domain_loss import DomainLoss
from ..evaluation.results import EvaluationReport, Score, TaskInfo
from ..evaluation.tasks import ACCURACIES
from .console import results_table, stdout_console


if TYPE_CHECKING:
    from rich.table import Table

SURE = "*"
# In standard errors of a difference: chance alone goes beyond in one of twenty.
SURE_ERRORS = 2
# Columns of longer names are numbered instead.
MAX_NAME_LENGTH = 16
NO_FIGURE = "-"


def print_report(report: EvaluationReport) -> None:
    """Print the tables and notes."""
    console = stdout_console()
    titles = column_titles(report)
    if report.tasks:
        console.print(tasks_table(report, titles))
    if report.checkpoints[0].domains:
        console.print(perplexity_table(report, titles))
    legend = "± is the standard error."
    if len(report.checkpoints) > 1:
        console.print(differences_table(report, titles))
        legend = f"± is the standard error, {SURE} a difference of more than {SURE_ERRORS} of its own."
    numbered = [
        f"{title}: {checkpoint.name}"
        for title, checkpoint in zip(titles, report.checkpoints, strict=True)
        if title != checkpoint.name
    ]
    for note in (*numbered, legend, *report.notes):
        console.print(note, soft_wrap=True, markup=False)


def column_titles(report: EvaluationReport) -> list[str]:
    """Return the name of each checkpoint, or numbers if one is too long for a column."""
    names = [checkpoint.name for checkpoint in report.checkpoints]
    if max(map(len, names)) <= MAX_NAME_LENGTH:
        return names
    return [f"#{number}" for number in range(1, len(names) + 1)]


def tasks_table(report: EvaluationReport, titles: Sequence[str]) -> "Table":
    """Return the tasks, and below them the averages."""
    columns = ("Task", "Metric", "Items", "Chance", *titles)
    table = results_table("Tasks, %", *columns, numbers=columns[2:])
    for info in report.tasks:
        scores = [checkpoint.tasks[info.name][info.metric] for checkpoint in report.checkpoints]
        shown = _accuracy if info.metric in ACCURACIES else _number
        table.add_row(info.name, info.metric, _size(info), _percent(info.chance), *map(shown, scores))
    table.add_row()
    for name, average in report.checkpoints[0].averages.items():
        scores = [checkpoint.averages[name].score for checkpoint in report.checkpoints]
        num_tasks, num_missing = len(average.tasks), len(average.missing)
        size = f"{num_tasks} tasks" if not num_missing else f"{num_tasks} of {num_tasks + num_missing} tasks"
        chance = _mean_chance(report.tasks, average.tasks)
        table.add_row(name, "mean", size, _percent(chance), *map(_accuracy, scores), style="bold")
    return table


def perplexity_table(report: EvaluationReport, titles: Sequence[str]) -> "Table":
    """Return the domains."""
    table = results_table("Perplexity, bits per byte", "Domain", "Tokens", *titles, numbers=("Tokens", *titles))
    for domain in report.checkpoints[0].domains:
        row = [checkpoint.domains[domain] for checkpoint in report.checkpoints]
        counts = sorted({loss.num_tokens for loss in row})
        table.add_row(domain, " to ".join(f"{count:,}" for count in counts), *map(_perplexity, row))
    return table


def differences_table(report: EvaluationReport, titles: Sequence[str]) -> "Table":
    """Return how much more than the first checkpoint the others score; a mark says which differences are sure."""
    others = [checkpoint.differences for checkpoint in report.checkpoints[1:]]
    table = results_table(f"Difference from {titles[0]}", "Score", "In", *titles[1:], numbers=titles[1:])
    tasks = [info.name for info in report.tasks if info.name in others[0].tasks]
    rows = [(name, "points", [found.tasks[name] for found in others]) for name in tasks]
    rows += [(name, "points", [found.averages[name] for found in others]) for name in others[0].averages]
    for name, unit, row in rows:
        table.add_row(name, unit, *(_difference(score, 100, 1) for score in row))
    for name in report.checkpoints[0].domains:
        row = [found.domains.get(name) for found in others]
        table.add_row(name, "bits per byte", *(_difference(score, 1, 3) for score in row))
    return table


def _difference(score: Score | None, scale: float, decimals: int) -> str:
    if score is None:
        return NO_FIGURE
    # Rounded first: what rounds to zero has no minus.
    shown = f"{round(scale * score.value, decimals) + 0.0:+.{decimals}f}"
    if score.stderr is None:
        return f"{shown} "
    is_sure = abs(score.value) > SURE_ERRORS * score.stderr
    return f"{shown} ± {scale * score.stderr:.{decimals}f}{SURE if is_sure else ' '}"


def _accuracy(score: Score) -> str:
    return f"{100 * score.value:.1f}" + ("" if score.stderr is None else f" ± {100 * score.stderr:.1f}")


def _number(score: Score) -> str:
    # Of other figures than accuracies it is not known what the best is.
    return f"{score.value:.4g}" + ("" if score.stderr is None else f" ± {score.stderr:.2g}")


def _perplexity(loss: DomainLoss) -> str:
    decimals = 2 if loss.perplexity < 100 else 0
    # Past that, the digits of a number tell nothing.
    value = f"{loss.perplexity:.{decimals}f}" if loss.perplexity < 1e6 else f"{loss.perplexity:.1e}"
    error = "" if loss.stderr is None else f" ± {loss.perplexity * loss.stderr:.{decimals}f}"
    bits = NO_FIGURE if loss.bits_per_byte is None else f"{loss.bits_per_byte:.3f}"
    return f"{value}{error if loss.perplexity < 1e6 else ''}, {bits}"


def _size(info: TaskInfo) -> str:
    if info.num_items == info.num_available:
        return f"{info.num_items:,}"
    return f"{info.num_items:,} of {info.num_available:,}"


def _mean_chance(infos: Sequence[TaskInfo], tasks: Sequence[str]) -> float | None:
    chances = [info.chance for info in infos if info.name in tasks]
    return None if None in chances else sum(chances) / len(chances)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
