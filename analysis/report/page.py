"""`report.html`: one file that needs nothing else, neither the network nor scripts to be read."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..results import AnalysisReport, CheckpointResult
from .charts import LayerChart, comparison_charts, measure_charts
from .colors import gradient
from .listings import Listing, listings
from .scales import format_number
from .styles import NUM_DOMAIN_STYLES, NUM_STYLES, style_rules
from .summary import SummaryRow, grouped_notes, summary
from .svg import bar_axis, grouped_bars, heat_map, line_chart
from .tables import DrawnTable, drawn_tables


# Of sections whose measure's name does not say enough.
TITLES = {
    "domains": "Domain specialisation",
    "committee": "Standing committee",
    "co_activation": "Co-activation",
    "local_consistency": "Local routing consistency",
}


@dataclass(frozen=True)
class Section:
    """All that one measure found.

    Args:
        notes: sentences, each with the names of the checkpoints that it is about; no names if it is about all.
    """

    slug: str
    title: str
    notes: list[tuple[str, list[str]]]
    charts: list[LayerChart]
    tables: list[DrawnTable]
    listings: list[Listing]


def render_page(report: AnalysisReport) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("upcycled_moe.analysis.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": format_number, "linked": _linked, "json": json.dumps, "slug": _slug}
    rows = summary(report)
    comparisons = comparison_charts(report)
    return environment.get_template("report.html").render(
        report=report,
        rows=[(measure, list(of_measure)) for measure, of_measure in groupby(rows, key=lambda row: row.measure)],
        sections=[_section(report, measure, rows) for measure in _measures(report, rows)],
        comparisons=comparisons,
        comparison_figures=[
            figure for chart in comparisons for figure in (chart.figure, chart.baseline) if figure is not None
        ],
        has_parents=any(checkpoint.parent for checkpoint in report.checkpoints),
        num_styles=NUM_STYLES,
        num_domain_styles=NUM_DOMAIN_STYLES,
        line_chart=line_chart,
        values=_values,
        heat_map=heat_map,
        bars=_bars,
        title_of=_title_of,
        layers_of=_layers_of,
        style=_asset("style.css") + Markup(style_rules()) + Markup(".ramp {{ background: {} }}\n").format(gradient()),
        script=_asset("layers.js"),
    )


def _asset(name: str) -> Markup:
    return Markup(files(__package__).joinpath("page", name).read_text(encoding="utf-8"))


def _measures(report: AnalysisReport, rows: Sequence[SummaryRow]) -> list[str]:
    """Return the names of all measures, those with figures first, in the order of their rows."""
    names = [row.measure for row in rows]
    return list(dict.fromkeys([*names, *(name for each in report.checkpoints for name in each.measures)]))


def _section(report: AnalysisReport, measure: str, rows: Sequence[SummaryRow]) -> Section:
    return Section(
        slug=_slug(measure),
        title=_title_of(measure),
        notes=grouped_notes(report, measure),
        charts=measure_charts(report, [row for row in rows if row.measure == measure]),
        tables=drawn_tables(report, measure),
        listings=listings(report, measure),
    )


def _values(chart: LayerChart) -> tuple[list[str], list[tuple[int, list[float | None]]]]:
    """Return a chart as a table: the columns' names, and of each layer its index and a number for each column."""
    names = [each.name for each in chart.series] + [f"{each.name}, by load" for each in chart.baselines]
    by_layer = [dict(zip(each.indices, each.values, strict=True)) for each in (*chart.series, *chart.baselines)]
    return names, [(layer, [values.get(layer) for values in by_layer]) for layer in chart.layers]


def _bars(table: DrawnTable) -> dict[str, Markup]:
    """Return grouped bars of the last layer by checkpoint, if the table is drawn so."""
    if not table.has_bars:
        return {}
    grids = {panel.name: panel.last[1] for panel in table.panels}
    axis = bar_axis(value for grid in grids.values() for value in grid.values[~np.isnan(grid.values)].tolist())
    return {name: grouped_bars(grid, axis, table.view.title) for name, grid in grids.items()}


def _title_of(name: str) -> str:
    return TITLES.get(name) or name.replace("_", " ").capitalize()


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def _layers_of(checkpoint: CheckpointResult) -> str:
    """Return e.g. `24 (0 to 23)`."""
    layers = checkpoint.layers
    return f"{len(layers)} ({layers[0]} to {layers[-1]})" if len(layers) > 1 else f"1 ({layers[0]})"


def _linked(source: str) -> Markup:
    """Return `source` with its arXiv numbers as links."""
    parts = re.split(r"(?:arXiv:? ?)(\d{4}\.\d{4,5})", source)
    link = Markup('<a href="https://arxiv.org/abs/{0}">arXiv {0}</a>')
    return Markup().join(link.format(part) if index % 2 else part for index, part in enumerate(parts))
