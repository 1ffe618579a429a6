"""The tables of `upcycled-moe evaluate`: a row for each task or domain, a column for each checkpoint."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..evaluation.results import DomainLoss, EvaluationReport, Score, TaskInfo
from ..evaluation.tasks import ACCURACIES
from .console import results_table, stdout_console


if TYPE_CHECKING:
    from rich.table import Table

BEST = "*"


def print_report(report: EvaluationReport) -> None:
    """Print the tables and notes."""
    console = stdout_console()
    if report.tasks:
        console.print(tasks_table(report))
    if report.checkpoints[0].domains:
        console.print(perplexity_table(report))
    legend = "± is the standard error" + (f", {BEST} the best of a row." if len(report.checkpoints) > 1 else ".")
    for note in (legend, *report.notes):
        console.print(note, soft_wrap=True, markup=False)


def tasks_table(report: EvaluationReport) -> "Table":
    """Return the tasks, and below them the averages."""
    names = [checkpoint.name for checkpoint in report.checkpoints]
    columns = ("Task", "Metric", "Items", "Chance", *names)
    table = results_table("Tasks, %", *columns, numbers=columns[2:])
    for info in report.tasks:
        scores = [checkpoint.tasks[info.name][info.metric] for checkpoint in report.checkpoints]
        cells = _accuracies(scores) if info.metric in ACCURACIES else [_number(score) for score in scores]
        table.add_row(info.name, info.metric, _size(info), _percent(info.chance), *cells)
    table.add_row()
    for name, average in report.checkpoints[0].averages.items():
        scores = [checkpoint.averages[name].score for checkpoint in report.checkpoints]
        num_tasks, num_missing = len(average.tasks), len(average.missing)
        size = f"{num_tasks} tasks" if not num_missing else f"{num_tasks} of {num_tasks + num_missing} tasks"
        chance = _mean_chance(report.tasks, average.tasks)
        table.add_row(name, "mean", size, _percent(chance), *_accuracies(scores), style="bold")
    return table


def perplexity_table(report: EvaluationReport) -> "Table":
    """Return the domains; the best is the one with the fewest bits per byte, whatever its tokens are."""
    names = [checkpoint.name for checkpoint in report.checkpoints]
    table = results_table("Perplexity, bits per byte", "Domain", "Tokens", *names, numbers=("Tokens", *names))
    for domain in report.checkpoints[0].domains:
        row = [checkpoint.domains[domain] for checkpoint in report.checkpoints]
        counts = sorted({loss.num_tokens for loss in row})
        marks = _marks([-round(loss.bits_per_byte, 3) for loss in row])
        cells = [_perplexity(loss) + mark for loss, mark in zip(row, marks, strict=True)]
        table.add_row(domain, " to ".join(f"{count:,}" for count in counts), *cells)
    return table


def _accuracies(scores: Sequence[Score]) -> list[str]:
    marks = _marks([round(100 * score.value, 1) for score in scores])
    return [
        f"{100 * score.value:.1f}" + ("" if score.stderr is None else f" ± {100 * score.stderr:.1f}") + mark
        for score, mark in zip(scores, marks, strict=True)
    ]


def _number(score: Score) -> str:
    # Of other figures than accuracies it is not known what the best is.
    return f"{score.value:.4g}" + ("" if score.stderr is None else f" ± {score.stderr:.2g}")


def _perplexity(loss: DomainLoss) -> str:
    decimals = 2 if loss.perplexity < 100 else 0
    # Past that, the digits of a number tell nothing.
    value = f"{loss.perplexity:.{decimals}f}" if loss.perplexity < 1e6 else f"{loss.perplexity:.1e}"
    error = "" if loss.stderr is None else f" ± {loss.perplexity * loss.stderr:.{decimals}f}"
    return f"{value}{error if loss.perplexity < 1e6 else ''}, {loss.bits_per_byte:.3f}"


def _marks(values: Sequence[float]) -> list[str]:
    """Return the mark of each value, as it is shown: of the largest ones, or of none if all are."""
    if len(values) == 1:
        return [""]
    best = max(values)
    return [BEST if best == value > min(values) else " " for value in values]


def _size(info: TaskInfo) -> str:
    if info.num_items == info.num_available:
        return f"{info.num_items:,}"
    return f"{info.num_items:,} of {info.num_available:,}"


def _mean_chance(infos: Sequence[TaskInfo], tasks: Sequence[str]) -> float | None:
    chances = [info.chance for info in infos if info.name in tasks]
    return None if None in chances else sum(chances) / len(chances)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
