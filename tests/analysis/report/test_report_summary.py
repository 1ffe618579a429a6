"""The table of means over layers."""

import pytest

from upcycled_moe.analysis.measures import Measure
from upcycled_moe.analysis.report import summary as summary_module
from upcycled_moe.analysis.report.summary import summary
from upcycled_moe.analysis.results import AnalysisReport, CheckpointResult, Figure, MeasureResult


ENTROPY = Figure("entropy", "Entropy", "-Σ p ln p", "0 to ln E", "ours")
LOAD_ENTROPY = Figure("load_entropy", "Load entropy", "-Σ f ln f", "0 to ln E", "ours")


class _Routing(Measure):
    name = "routing"
    figures = (ENTROPY, LOAD_ENTROPY)


def _checkpoint(name: str, **measures: dict[str, list[float | None]]) -> CheckpointResult:
    results = {measure: MeasureResult(per_layer=per_layer) for measure, per_layer in measures.items()}
    return CheckpointResult(name, f"/models/{name}", "qwen2_moe", 4, 2, [0, 1, 2], "digest", {"math": 10}, results)


@pytest.fixture
def rows_of(monkeypatch):
    monkeypatch.setattr(summary_module, "MEASURES", (_Routing,))
    return lambda *checkpoints: summary(AnalysisReport({}, ["math"], list(checkpoints), [], {}))


def test_means_leave_out_layers_without_a_number(rows_of):
    (row,) = rows_of(_checkpoint("a", routing={"entropy": [1.0, None, 2.0]}))
    assert (row.name, row.figure, row.values) == ("routing.entropy", ENTROPY, [1.5])


def test_figures_that_no_checkpoint_has_numbers_of_are_left_out(rows_of):
    first = _checkpoint("a", routing={"entropy": [None, None], "load_entropy": [1.0, 2.0]})
    assert [row.name for row in rows_of(first)] == ["routing.load_entropy"]


def test_rows_follow_the_measures_and_unknown_figures_come_last(rows_of):
    first = _checkpoint("a", later={"new_figure": [5.0]}, routing={"load_entropy": [1.0]})
    second = _checkpoint("b", routing={"entropy": [2.0], "load_entropy": [None]})
    rows = rows_of(first, second)
    assert [row.name for row in rows] == ["routing.entropy", "routing.load_entropy", "later.new_figure"]
    assert [row.values for row in rows] == [[None, 2.0], [1.0, None], [5.0, None]]
    assert rows[2].figure.title == "New figure"
