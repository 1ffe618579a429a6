"""Curves of figures over rounds, of one run or of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...common.pictures import new_figure, save_png


# What is drawn where it was measured, and what its axis says.
CURVES = {
    "accuracy": "accuracy on held-out pairs",
    "margin": "reward margin on held-out pairs",
    "loss": "DPO loss on held-out pairs, against π_0",
    "divergence": "KL(π_t || π_0), nats an answer",
    "reward": "reward of the policy's answers",
}


def plot_rounds(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Write a picture of the figures of `runs`, each the rows of a `rounds.jsonl` by a name, to the PNG `path`.

    Raises:
        OSError: if it cannot be written.
    """
    shown = [name for name in CURVES if any(row.get(name) is not None for rows in runs.values() for row in rows)]
    figure = new_figure(height=3.2, width=3.6 * len(shown))
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for run, rows in runs.items():
            rows = [row for row in rows if row.get(name) is not None]
            errors = [row.get(f"{name}_error") or 0.0 for row in rows]
            axes.errorbar([row["round"] for row in rows], [row[name] for row in rows], errors, label=run, capsize=2)
        axes.set_xlabel("round")
        axes.set_title(CURVES[name], fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    if len(runs) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs))
    save_png(figure, path)
