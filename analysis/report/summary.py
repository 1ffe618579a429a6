"""The figures of a report in one table: means over the layers, a column a checkpoint."""

from dataclasses import dataclass

from ..measures import MEASURES
from ..results import AnalysisReport, Figure


@dataclass(frozen=True)
class SummaryRow:
    """A figure and its means.

    Args:
        measure: the measure that it belongs to.
        figure: with its definition; only the name is known of one that no measure of this version has.
        values: mean over the layers that have one, by checkpoint; None where none has.
    """

    measure: str
    figure: Figure
    values: list[float | None]

    @property
    def name(self) -> str:
        """What tells the row from all others, e.g. `routing.entropy`."""
        return f"{self.measure}.{self.figure.name}"


def summary(report: AnalysisReport) -> list[SummaryRow]:
    """Return a row for each figure that any of the checkpoints has numbers of, in the order of the measures."""
    rows = []
    for measure, figure in _figures(report):
        results = [checkpoint.measures.get(measure) for checkpoint in report.checkpoints]
        means = [each.mean(figure.name) if each and figure.name in each.per_layer else None for each in results]
        if any(mean is not None for mean in means):
            rows.append(SummaryRow(measure, figure, means))
    return rows


def grouped_notes(report: AnalysisReport, measure: str) -> list[tuple[str, list[str]]]:
    """Return the notes of a measure, each once, with the checkpoints that it is about; with none if with all."""
    notes: dict[str, list[str]] = {}
    with_measure = [checkpoint for checkpoint in report.checkpoints if measure in checkpoint.measures]
    for checkpoint in with_measure:
        for note in checkpoint.measures[measure].notes:
            notes.setdefault(note, []).append(checkpoint.name)
    return [(note, [] if len(names) == len(with_measure) else names) for note, names in notes.items()]


def undefined_figure(name: str) -> Figure:
    """Return a figure of which only the name is known."""
    return Figure(name=name, title=name.replace("_", " ").capitalize(), formula="", meaning="", source="")


def _figures(report: AnalysisReport) -> list[tuple[str, Figure]]:
    found = {
        (measure, name): None
        for checkpoint in report.checkpoints
        for measure, result in checkpoint.measures.items()
        for name in result.per_layer
    }
    defined = {(measure.name, figure.name): figure for measure in MEASURES for figure in measure.figures}
    order = [*(key for key in defined if key in found), *(key for key in found if key not in defined)]
    return [(measure, defined.get((measure, name)) or undefined_figure(name)) for measure, name in order]
