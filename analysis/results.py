"""What an analysis found, as it is written to `report.json` and drawn.

Dimensions: L MoE layers, D domains, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


REPORT_FORMAT = 1


@dataclass(frozen=True)
class Figure:
    """A figure with its definition, which the report shows beside it.

    Args:
        name: its key in the report.
        title: what a person calls it.
        formula: its definition, in symbols that the documentation explains.
        meaning: how to read it: its range, and what high and low say.
        source: paper with its arXiv number, equation or section where it has one; "ours" if it is.
    """

    name: str
    title: str
    formula: str
    meaning: str
    source: str


@dataclass
class MeasureResult:
    """The figures of one measure for one checkpoint.

    Args:
        per_layer: by figure, one number a MoE layer [L]; None where there is none.
        tables: by name, nested lists of numbers, such as a matrix [E][E] for each layer; the measure documents them.
        notes: sentences for the reader, such as what was left out.
    """

    per_layer: dict[str, list[float | None]] = field(default_factory=dict)
    tables: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def mean(self, figure: str) -> float | None:
        """Return the mean of a figure over the layers that have one."""
        return _mean(self.per_layer[figure])


@dataclass
class CheckpointResult:
    """What was found in one checkpoint.

    Args:
        name: what the report calls it, different for each.
        path: folder or Hub id, as given.
        num_experts: E to choose from.
        layers: index in the model of each MoE layer [L].
        tokenizer: digest; checkpoints with the same one saw the same tokens.
        num_tokens: tokens of each domain that it saw.
        measures: by the measure's name.
        parent: dense checkpoint that its experts are compared with.
    """

    name: str
    path: str
    model_type: str
    num_experts: int
    num_experts_per_tok: int
    layers: list[int]
    tokenizer: str
    num_tokens: dict[str, int]
    measures: dict[str, MeasureResult] = field(default_factory=dict)
    parent: str | None = None


@dataclass
class Comparison:
    """How two checkpoints that saw the same tokens differ.

    Args:
        first, second: names of the checkpoints.
        per_layer: by figure, one number a MoE layer [L].
    """

    first: str
    second: str
    per_layer: dict[str, list[float | None]]

    def mean(self, figure: str) -> float | None:
        """Return the mean of a figure over the layers that have one."""
        return _mean(self.per_layer[figure])


@dataclass
class AnalysisReport:
    """All that an analysis found.

    Args:
        settings: what it was asked for.
        domains: names, in the order of the tables.
        versions: of the packages.
        notes: sentences for the reader, such as what was left out.
        comparison_notes: sentences on the comparisons, such as which checkpoints could not be compared.
    """

    settings: dict[str, Any]
    domains: list[str]
    checkpoints: list[CheckpointResult]
    comparisons: list[Comparison]
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)
    comparison_notes: list[str] = field(default_factory=list)
    format: int = REPORT_FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Return the report for JSON; it shares the lists, which may hold millions of numbers."""
        checkpoints = [
            {**vars(one), "measures": {name: dict(vars(each)) for name, each in one.measures.items()}}
            for one in self.checkpoints
        ]
        return {**vars(self), "checkpoints": checkpoints, "comparisons": [dict(vars(one)) for one in self.comparisons]}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "AnalysisReport":
        """Return the report that `to_dict` gave."""
        checkpoints = [
            CheckpointResult(
                **{**one, "measures": {name: MeasureResult(**each) for name, each in one["measures"].items()}}
            )
            for one in content["checkpoints"]
        ]
        comparisons = [Comparison(**one) for one in content["comparisons"]]
        return cls(**{**content, "checkpoints": checkpoints, "comparisons": comparisons})


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
