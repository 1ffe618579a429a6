"""The main charts as PNG, for papers and model cards."""

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...common.pictures import new_figure, save_png
from ..results import AnalysisReport
from .charts import LayerChart, comparison_charts, measure_charts
from .styles import domain_color, series_color, series_dashes
from .summary import summary
from .tables import DrawnTable, Grid, drawn_table


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

OVERVIEW_FILE = "overview.png"
OVERVIEW_FIGURES = (
    *("entropy", "max_violation", "routing_diversity"),
    *("domain_divergence", "expert_output_similarity", "parent_divergence"),
)
# Of figures by layer, and of tables, of which the last layer is drawn unless layers are the rows.
CHART_FILES = {
    "expert_output_similarity": "expert_output_similarity.png",
    "parent_divergence": "parent_divergence.png",
    "router_saturation": "router_saturation.png",
}
TABLE_FILES = {
    ("routing_weights", "weights"): "routing_weights.png",
    ("routing", "load"): "load.png",
    ("co_activation", "co_activation"): "co_activation.png",
}
PICTURE_FILES = (OVERVIEW_FILE, *CHART_FILES.values(), *TABLE_FILES.values())

_MAX_COLUMNS = 3
_MAX_TICKS = 12


def write_pictures(report: AnalysisReport, folder: Path) -> None:
    """Write the charts that there are figures for into `folder`.

    Raises:
        OSError: if one cannot be written.
    """
    charts = [
        chart
        for _, rows in groupby(summary(report), key=lambda row: row.measure)
        for chart in measure_charts(report, list(rows))
    ]
    overview = [chart for chart in charts if chart.figure.name in OVERVIEW_FIGURES]
    if overview:
        _write_charts(overview, folder / OVERVIEW_FILE, _MAX_COLUMNS)
    for chart in [*charts, *comparison_charts(report)]:
        if chart.figure.name in CHART_FILES:
            _write_charts([chart], folder / CHART_FILES[chart.figure.name], 1)
    for (measure, name), file in TABLE_FILES.items():
        table = drawn_table(report, measure, name)
        if table:
            _write_table(table, folder / file)


def _write_charts(charts: Sequence[LayerChart], path: Path, num_columns: int) -> None:
    num_rows = math.ceil(len(charts) / num_columns)
    figure = new_figure(height=3.2 * num_rows + 0.4, width=max(4.6 * num_columns, 7.0))
    grid = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes, chart in zip(grid, charts, strict=False):
        _draw_chart(axes, chart)
    for axes in grid[len(charts) :]:
        axes.set_visible(False)
    names = [series.name for series in charts[0].series]
    if len(names) > 1:
        legend = figure.legend(grid[0].lines[: len(names)], _places(names), loc="outside upper left", ncols=3)
        _name(legend, names)
    save_png(figure, path)


def _draw_chart(axes: "Axes", chart: LayerChart) -> None:
    for number, series in enumerate(chart.series):
        dashes = series_dashes(number)
        axes.plot(
            series.indices,
            _with_gaps(series.values),
            color=series_color(number),
            linestyle=(0, dashes) if dashes else "-",
            marker="o",
            markersize=3,
        )
    for number, series in enumerate(chart.baselines):
        values = _with_gaps(series.values)
        axes.plot(series.indices, values, color=series_color(number), linestyle=":", linewidth=1)
    by_chance = " (thin: by load)" if chart.baseline else ""
    axes.set_title(_plain(chart.figure.title + by_chance), loc="left", fontsize=10)
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dfe3e8", linewidth=0.6)


def _write_table(table: DrawnTable, path: Path) -> None:
    num_columns = min(len(table.panels), _MAX_COLUMNS)
    num_rows = math.ceil(len(table.panels) / num_columns)
    figure = new_figure(height=3.5 * num_rows + 0.4, width=max(5.2 * num_columns, 7.0))
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=table.has_bars).flatten()
    for axes in grid[len(table.panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid, table.panels, strict=False):
        layer, values = panel.last
        (_draw_bars if table.has_bars else _draw_map)(axes, values)
        axes.set_xlabel(values.column_title)
        axes.set_title(
            _plain(panel.name if layer is None else f"{panel.name}, layer {layer}"), loc="left", fontsize=10
        )
    figure.suptitle(_plain(table.view.title), x=0.01, ha="left", fontsize=11)
    save_png(figure, path)


def _draw_bars(axes: "Axes", grid: Grid) -> None:
    width = 0.84 / len(grid.rows)
    places = np.arange(len(grid.columns))
    for number, row in enumerate(grid.values):
        left = places + (number - (len(grid.rows) - 1) / 2) * width
        axes.bar(left, np.nan_to_num(row), width, color=domain_color(number))
    axes.set_xticks(places, grid.columns)
    axes.spines[["top", "right"]].set_visible(False)
    _name(axes.legend(axes.containers, _places(grid.rows), fontsize=8, ncols=2), grid.rows)


def _draw_map(axes: "Axes", grid: Grid) -> None:
    aspect = "equal" if grid.row_title == grid.column_title else "auto"
    image = axes.imshow(grid.values, cmap="viridis", vmin=grid.low, vmax=grid.high, aspect=aspect)
    axes.set_ylabel(grid.row_title)
    for axis, labels in ((axes.xaxis, grid.columns), (axes.yaxis, grid.rows)):
        every = math.ceil(len(labels) / _MAX_TICKS)
        axis.set_ticks(range(0, len(labels), every), [_plain(label) for label in labels[::every]])
    axes.figure.colorbar(image, ax=axes)


def _places(names: Sequence[str]) -> list[str]:
    """Return what `_name` overwrites: Matplotlib leaves those out of a legend that begin with an underscore."""
    return ["name"] * len(names)


def _name(legend: "Legend", names: Sequence[str]) -> None:
    """Put `names` into `legend`, whatever they begin with."""
    legend.set_frame_on(False)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(_plain(name))


def _with_gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _plain(text: str) -> str:
    """Return `text` for Matplotlib, which reads formulas between dollar signs."""
    return text.replace("$", r"\$")
