"""What is drawn over the layers: a figure of all checkpoints, or of all pairs of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..results import AnalysisReport, Figure
from ..saturation import FIGURES as COMPARISON_FIGURES
from .summary import SummaryRow, undefined_figure


# How the name of a figure ends that says what the loads alone give of another; both are drawn in one chart.
BASELINE_SUFFIX = "_by_load"


@dataclass(frozen=True)
class Series:
    """A line: `values` at the whole numbers `indices`, with gaps where a value is None."""

    name: str
    indices: Sequence[int]
    values: Sequence[float | None]


@dataclass(frozen=True)
class LayerChart:
    """A figure by layer, a line a checkpoint or pair, and with each what the loads alone give, if that is known."""

    figure: Figure
    series: list[Series]
    baseline: Figure | None = None
    baselines: list[Series] = field(default_factory=list)

    @property
    def layers(self) -> list[int]:
        """The layers that any of the lines has."""
        return sorted({index for each in self.series for index in each.indices})


def measure_charts(report: AnalysisReport, rows: Sequence[SummaryRow]) -> list[LayerChart]:
    """Return a chart for each of the `rows`, which are of one measure."""
    charts = []
    for row in rows:
        series = []
        for checkpoint in report.checkpoints:
            result = checkpoint.measures.get(row.measure)
            values = result.per_layer.get(row.figure.name) if result else None
            series.append(Series(checkpoint.name, checkpoint.layers, values or [None] * len(checkpoint.layers)))
        charts.append(LayerChart(row.figure, series))
    return _with_baselines(charts)


def comparison_charts(report: AnalysisReport) -> list[LayerChart]:
    """Return a chart for each figure of the comparisons that has numbers, a line a pair."""
    layers = {checkpoint.name: checkpoint.layers for checkpoint in report.checkpoints}
    defined = {figure.name: figure for figure in COMPARISON_FIGURES}
    charts = []
    for name in dict.fromkeys(name for each in report.comparisons for name in each.per_layer):
        series = []
        for each in report.comparisons:
            indices = layers[each.first]
            values = each.per_layer.get(name) or [None] * len(indices)
            series.append(Series(f"{each.first} and {each.second}", indices, values))
        if any(value is not None for each in series for value in each.values):
            charts.append(LayerChart(defined.get(name) or undefined_figure(name), series))
    return _with_baselines(charts)


def _with_baselines(charts: Sequence[LayerChart]) -> list[LayerChart]:
    """Return `charts`, those of baselines joined to the chart of their figure."""
    by_name = {chart.figure.name: chart for chart in charts}
    joined = []
    for name, chart in by_name.items():
        baseline = by_name.get(name + BASELINE_SUFFIX)
        if baseline:
            joined.append(LayerChart(chart.figure, chart.series, baseline.figure, baseline.series))
        elif not name.endswith(BASELINE_SUFFIX) or name.removesuffix(BASELINE_SUFFIX) not in by_name:
            joined.append(chart)
    return joined
