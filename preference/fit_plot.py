"""A picture of how coefficients of a merge were learned.

Dimensions: G groups, K sources, N steps.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..common.pictures import new_figure, save_png
from .fit_record import FitRecord


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

# More groups than these would be too small to read.
MAX_PANELS = 16
# More sources have no colours that tell them apart.
MAX_LEGEND = 10
_NUM_COLUMNS = 4


def plot_fit(record: FitRecord, path: Path) -> None:
    """Write a PNG of the coefficients of each group by step, of the loss and of the gradient norm to `path`.

    Of more than `MAX_PANELS` groups as many are shown, from the first to the last at even distances.

    Raises:
        ImportError: if Matplotlib is not installed; see [`common.pictures.can_draw`].
        OSError: if it cannot be written.
    """
    groups = _shown(list(record.initial))
    num_columns = min(_NUM_COLUMNS, len(groups))
    num_rows = math.ceil(len(groups) / num_columns)
    figure = new_figure(height=2.4 + 1.9 * num_rows)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.9 * num_rows, 2.4])
    panels = list(top.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False).flat)
    for panel, name in zip(panels, groups, strict=False):
        _draw_group(panel, record, name)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(groups) - num_columns) : len(groups)]:
        panel.tick_params(labelbottom=True)
    # The axes are shared, and one call is for all of them.
    panels[0].set_ylim(0, None)
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    left_out = f" ({len(groups)} of {len(record.initial)} groups)" * (len(groups) < len(record.initial))
    handles, labels = panels[0].get_legend_handles_labels()
    if len(handles) <= MAX_LEGEND:
        top.legend(handles, labels, title="source", frameon=False, fontsize="small", loc="outside right upper")
        colors = ""
    else:
        colors = f"; sources from 0 (dark) to {labels[-1]} (light)"
    top.suptitle(f"Coefficients by optimizer step{left_out}{colors}", fontsize="medium")
    _draw_loss(bottom, record)
    save_png(figure, path)


def _shown(names: list[str]) -> list[str]:
    if len(names) <= MAX_PANELS:
        return names
    return [names[round(at)] for at in np.linspace(0, len(names) - 1, MAX_PANELS)]


def _draw_group(axes: "Axes", record: FitRecord, name: str) -> None:
    from matplotlib import colormaps

    lines = np.array([record.initial[name], *(step.coefficients[name] for step in record.steps)])  # [N + 1, K]
    num_sources = lines.shape[1]
    colors = (
        colormaps["tab10"].colors
        if num_sources <= MAX_LEGEND
        else colormaps["viridis"](np.linspace(0, 1, num_sources))
    )
    for source in range(num_sources):
        axes.plot(lines[:, source], color=colors[source], linewidth=1.2, label=str(source))
    axes.set_title(name, loc="left", fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize="small")


def _draw_loss(figure: "SubFigure", record: FitRecord) -> None:
    axes = figure.subplots()
    other = axes.twinx()
    steps = np.arange(1, len(record.steps) + 1)
    norms = [step.gradient_norm for step in record.steps]
    other.plot(steps, norms, color="#bbbbbb", linewidth=1, label="gradient norm")
    axes.plot(steps, [step.loss for step in record.steps], color="#1f77b4", linewidth=1.2, label="training loss")
    ends = [record.before["loss"], record.after["loss"]]
    axes.scatter([0, steps[-1]], ends, color="black", zorder=3, s=18, label="held-out loss")
    axes.set(xlabel="optimizer steps", ylabel="loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    other.set(ylabel="gradient norm", ylim=(0, None))
    # The loss lies before the norm.
    axes.set_zorder(other.get_zorder() + 1)
    axes.patch.set_visible(False)
    for each in (axes, other):
        each.spines["top"].set_visible(False)
    figure.legend(frameon=False, fontsize="small", loc="outside upper right", ncols=3)
