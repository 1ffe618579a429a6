"""Which tables of the measures are drawn, and as what heat maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..results import AnalysisReport, CheckpointResult
from .scales import limits


# A table of more cells, over all layers and checkpoints, is drawn as images: a cell of its own takes 130 bytes.
MAX_CELLS = 4000


@dataclass(frozen=True)
class TableView:
    """How a table is drawn: as a heat map of its last two axes, one for each layer if there is an axis before them.

    Args:
        title: what its numbers are.
        axes: what each axis counts: `layer`, `domain` or `expert`.
        is_from_zero: whether its colours begin at 0, as those of shares must: a small difference is to look small.
    """

    title: str
    axes: tuple[str, ...]
    is_from_zero: bool = True

    @property
    def is_by_layer(self) -> bool:
        """Whether each layer has a heat map of its own."""
        return len(self.axes) == 3


_PER_EXPERT = ("layer", "expert")
_BY_DOMAIN = ("layer", "domain", "expert")
_PAIRS = ("layer", "expert", "expert")
VIEWS = {
    ("routing", "load"): TableView("Load: share of all selections", _PER_EXPERT),
    ("routing_weights", "weights"): TableView("Mean routing weight by domain", _BY_DOMAIN),
    ("routing_weights", "probabilities"): TableView(
        "Mean routing probability by domain, before selection", _BY_DOMAIN
    ),
    ("domains", "specialization"): TableView("Share of a domain's tokens that select an expert", _BY_DOMAIN),
    ("committee", "presence"): TableView("Share of domains with the expert among the top ones", _PER_EXPERT),
    ("committee", "committee"): TableView("Members of the standing committee: 1, all others: 0", _PER_EXPERT),
    ("co_activation", "co_activation"): TableView("Share of the row's tokens that select the column too", _PAIRS),
    ("expert_outputs", "similarity"): TableView("Cosine similarity of expert outputs", _PAIRS, is_from_zero=False),
    ("expert_weights", "similarity"): TableView("Cosine similarity of expert weights", _PAIRS, is_from_zero=False),
    ("expert_weights", "divergence"): TableView("Divergence from the parent", _PER_EXPERT),
    ("expert_weights", "update_similarity"): TableView(
        "Cosine similarity of the experts' updates", _PAIRS, is_from_zero=False
    ),
}
# What others show: the first is the specialisation over K, the second its mean over experts.
NOT_DRAWN = {("routing", "domain_load"), ("domains", "uniform")}

# The table whose last layer is drawn as bars too, as Figure 5 of Router Upcycling (arXiv 2509.00679) has it, and how
# many of them can be told apart.
BARS = ("routing_weights", "weights")
MAX_BAR_DOMAINS, MAX_BAR_EXPERTS = 10, 16


@dataclass(frozen=True, eq=False)
class Grid:
    """A matrix of numbers with what its rows and columns are.

    Args:
        row_title, column_title: what they count, e.g. `layer` and `expert`.
        rows, columns: their labels.
        values: [rows, columns]; NaN where there is no number.
        low, high: ends of the colour scale, the same for all checkpoints with as many experts.
        as_image: whether there are too many numbers to draw each by itself.
    """

    row_title: str
    column_title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray
    low: float
    high: float
    as_image: bool = False

    @property
    def shares(self) -> np.ndarray:
        """The places of the values on the colour scale, 0 to 1 [rows, columns]."""
        return (self.values - self.low) / (self.high - self.low)


@dataclass(frozen=True, eq=False)
class Panel:
    """The heat maps of one table of one checkpoint.

    Args:
        number: of the checkpoint in the report, which gives it its colour.
        name: of the checkpoint.
        grids: by the layer's index in the model; one only, under None, where layers are the rows.
    """

    number: int
    name: str
    grids: dict[int | None, Grid]

    @property
    def last(self) -> tuple[int | None, Grid]:
        """The last layer that has numbers, and its heat map."""
        return list(self.grids.items())[-1]


@dataclass(frozen=True, eq=False)
class DrawnTable:
    """A table as heat maps, one panel a checkpoint that has it."""

    measure: str
    name: str
    view: TableView
    panels: list[Panel]

    @property
    def has_bars(self) -> bool:
        """Whether the last layer is drawn as bars too."""
        return (self.measure, self.name) == BARS and all(
            len(grid.rows) <= MAX_BAR_DOMAINS and len(grid.columns) <= MAX_BAR_EXPERTS
            for grid in (panel.last[1] for panel in self.panels)
        )


def drawn_tables(report: AnalysisReport, measure: str) -> list[DrawnTable]:
    """Return what is drawn of the tables of a measure, those that this version knows first."""
    found = [name for each in report.checkpoints if measure in each.measures for name in each.measures[measure].tables]
    known = [name for of_measure, name in VIEWS if of_measure == measure and name in found]
    drawn = [drawn_table(report, measure, name) for name in dict.fromkeys([*known, *found])]
    return [table for table in drawn if table]


def drawn_table(report: AnalysisReport, measure: str, name: str) -> DrawnTable | None:
    """Return what is drawn of a table, None if there is nothing."""
    arrays, views = {}, {}
    for number, checkpoint in enumerate(report.checkpoints):
        result = checkpoint.measures.get(measure)
        array = _as_array(result.tables.get(name)) if result else None
        view = None if array is None else _view_of(measure, name, array.shape, checkpoint)
        if view and view.axes == _PAIRS:
            array = _without_diagonal(array)
        if view and not np.isnan(array).all():
            arrays[number], views[number] = array, view
    if not arrays:
        return None
    view = next(iter(views.values()))
    arrays = {number: array for number, array in arrays.items() if views[number] == view}
    as_image = sum(array.size for array in arrays.values()) > MAX_CELLS
    panels = []
    for number, array in arrays.items():
        checkpoint = report.checkpoints[number]
        alike = [other for at, other in arrays.items() if report.checkpoints[at].num_experts == checkpoint.num_experts]
        values = [value for other in alike for value in other[~np.isnan(other)].tolist()]
        scale = limits([0.0, *values] if view.is_from_zero else values)
        panels.append(
            Panel(number, checkpoint.name, _grids(view, array, _labels(report, checkpoint), scale, as_image))
        )
    return DrawnTable(measure, name, view, panels)


def _grids(
    view: TableView, array: np.ndarray, labels: dict[str, list[str]], scale: tuple[float, float], as_image: bool
) -> dict[int | None, Grid]:
    row, column = view.axes[-2:]
    layers = map(int, labels["layer"])
    matrices = dict(zip(layers, array, strict=True)) if view.is_by_layer else {None: array}
    return {
        layer: Grid(
            row,
            column,
            labels[row][: array.shape[-2]],
            labels[column][: array.shape[-1]],
            matrix,
            *scale,
            as_image=as_image,
        )
        for layer, matrix in matrices.items()
        if not np.isnan(matrix).all()
    }


def _labels(report: AnalysisReport, checkpoint: CheckpointResult) -> dict[str, list[str]]:
    return {
        "layer": [str(index) for index in checkpoint.layers],
        "domain": report.domains,
        "expert": [str(expert) for expert in range(checkpoint.num_experts)],
    }


def _as_array(content: Any) -> np.ndarray | None:
    """Return nested lists as an array, with NaN for None; nothing if they are ragged or hold something else."""
    try:
        return np.array(content, dtype=float)
    except (TypeError, ValueError):
        return None


def _without_diagonal(array: np.ndarray) -> np.ndarray:
    """Return pairs [L, E, E] without those of an expert with itself, whose ones would stretch the colour scale."""
    return np.where(np.eye(array.shape[-1], dtype=bool), np.nan, array)


def _view_of(measure: str, table: str, shape: tuple[int, ...], checkpoint: CheckpointResult) -> TableView | None:
    """Return how to draw a table, one that this version does not know by its shape; None if it is not drawn."""
    num_layers, num_domains, num_experts = len(checkpoint.layers), len(checkpoint.num_tokens), checkpoint.num_experts
    if (measure, table) in NOT_DRAWN or shape[:1] != (num_layers,):
        return None
    sizes = {"layer": num_layers, "domain": num_domains, "expert": num_experts}
    view = VIEWS.get((measure, table))
    if view is None:
        fitting = (axes for axes in (_PER_EXPERT, _PAIRS, _BY_DOMAIN) if shape == tuple(sizes[axis] for axis in axes))
        axes = next(fitting, None)
        return TableView(table.replace("_", " ").capitalize(), axes, is_from_zero=False) if axes else None
    if view.axes != _BY_DOMAIN:
        # Some have no numbers for experts without computation, which come last.
        sizes["expert"] = min(shape[-1], num_experts)
    return view if shape == tuple(sizes[axis] for axis in view.axes) else None
