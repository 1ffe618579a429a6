"""What `upcycled-moe merge` prints."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from rich.table import Table

    from ..common.derived_checkpoint import DerivedCheckpoint
    from ..merging.coefficients import MergeCoefficients
    from ..merging.merge import MergePlan
    from ..merging.settings import MergeSettings
    from ..merging.whole import WholePlan
    from ..preference.fit_record import FitRecord


def print_plan(plan: "MergePlan", out: Path, dry_run: bool) -> None:
    """Print what merged experts were written to `out`, or would be."""
    num_tokens = plan.chosen.num_tokens
    measured = f"Measured on {sum(num_tokens.values()):,} tokens of {', '.join(num_tokens)}." if num_tokens else None
    _print(_expert_table(plan), measured, plan.chosen.fit, plan.derived, out, dry_run)


def print_whole_plan(plan: "WholePlan", out: Path, dry_run: bool) -> None:
    """Print what merged checkpoints were written to `out`, or would be."""
    _print(_checkpoint_table(plan), None, plan.fit, plan.derived, out, dry_run)


def _print(
    table: "Table",
    measured: str | None,
    fit: "FitRecord | None",
    derived: "DerivedCheckpoint",
    out: Path,
    dry_run: bool,
) -> None:
    from ..common.numbers import format_bytes, format_count
    from .console import stdout_console

    console = stdout_console(table)
    console.print(table)
    lines: list[Any] = [measured] * (measured is not None) + (_learned(fit) if fit is not None else [])
    lines.append(
        f"{'Would write' if dry_run else 'Wrote'} {out} ({derived.config.architectures[0]}): "
        f"{format_bytes(derived.num_bytes)}, {format_count(derived.total_parameters)} parameters."
    )
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)


def _learned(fit: "FitRecord") -> list[str]:
    """Return in lines what the coefficients were learned from, how far they went, and what it gained."""
    unit = "blocks" if fit.settings.loss == "lm" else "pairs"
    changes = ", ".join(
        f"{name} {f'{fit.before[name]:.4f} -> ' if name in fit.before else ''}{value:.4f}"
        for name, value in fit.after.items()
    )
    return [
        f"Learned in {len(fit.steps):,} steps from {fit.num_train:,} {unit}, by {fit.settings.loss}.",
        f"Coefficients moved by up to {fit.largest_move:.3f}, and by up to {fit.largest_relative_move:.0%} of what "
        "they were.",
        f"On {fit.num_heldout:,} {unit} that were held out: {changes}.",
    ]


def _expert_table(plan: "MergePlan") -> "Table":
    """Return a table of the coefficients: a row a layer, or a row a matrix in layers where they differ."""
    from .console import results_table

    shared = plan.coefficients.shared
    num_experts = plan.derived.source.config.num_experts
    columns = ["Least", "Most", f"Entropy (at most {math.log(num_experts):.3f})"] + ["Shared expert"] * bool(shared)
    table = results_table(_title(plan.settings, plan.chosen.fit), "Layer", *columns, numbers=columns)
    for layer_idx, name, values in _rows(plan.coefficients):
        entropy = math.fsum(value * math.log(1 / value) for value in values if value > 0)
        figures = [min(values), max(values), entropy] + ([shared[layer_idx]] if shared else [])
        table.add_row(name, *(f"{figure:.3f}" for figure in figures))
    return table


def _title(settings: "MergeSettings", fit: "FitRecord | None") -> str:
    is_start = settings.method == "learned" and fit is None
    return f"Coefficients: {'where learning would start' if is_start else settings.method}"


def _rows(coefficients: "MergeCoefficients") -> Iterator[tuple[int, str, tuple[float, ...]]]:
    """Yield the layer, what to call the row, and its coefficients."""
    for layer_idx, matrices in coefficients.layers.items():
        if len(set(matrices.values())) == 1:
            yield layer_idx, str(layer_idx), next(iter(matrices.values()))
        else:
            yield from ((layer_idx, f"{layer_idx} {matrix}", values) for matrix, values in matrices.items())


def _checkpoint_table(plan: "WholePlan") -> "Table":
    """Return a table of the coefficients: a row a group of weights, a column a checkpoint."""
    from .console import results_table

    columns = [source.name for source in plan.series.sources]
    table = results_table(_title(plan.settings, plan.fit), "Weights", *columns, numbers=columns)
    for name, values in plan.coefficients.items():
        table.add_row(name, *(f"{value:.3f}" for value in values))
    return table
