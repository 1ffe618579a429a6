"""Which tables become heat maps, and with which scale."""

import numpy as np
import pytest
from synthetic_reports import make_report

from upcycled_moe.analysis.report.tables import drawn_table


def test_an_expert_with_itself_is_left_out_of_pairs():
    report = make_report(names=("only",), num_layers=1, num_experts=2)
    report.checkpoints[0].measures["expert_outputs"].tables["similarity"] = [[[1.0, 0.25], [0.5, 1.0]]]
    (panel,) = drawn_table(report, "expert_outputs", "similarity").panels
    layer, grid = panel.last
    assert layer == 0
    np.testing.assert_array_equal(grid.values, [[np.nan, 0.25], [0.5, np.nan]])
    assert grid.high == 0.5


def test_checkpoints_with_as_many_experts_share_a_scale():
    report = make_report(names=("a", "b", "c"), num_layers=1, num_experts=2)
    report.checkpoints[2].num_experts = 4
    for checkpoint, load in zip(report.checkpoints, ([0.5, 0.5], [0.1, 0.9], [0.25] * 4), strict=True):
        checkpoint.measures["routing"].tables["load"] = [load]
    panels = drawn_table(report, "routing", "load").panels
    assert [panel.last[1].high for panel in panels[:2]] == [0.9, 0.9]
    assert panels[2].last[1].high < 0.3


def test_a_load_that_is_nearly_even_looks_so():
    report = make_report(names=("only",), num_layers=1, num_experts=2)
    report.checkpoints[0].measures["routing"].tables["load"] = [[0.52, 0.48]]
    report.checkpoints[0].measures["expert_outputs"].tables["similarity"] = [[[1.0, 0.96], [0.95, 1.0]]]
    (load,), (similarity,) = (
        drawn_table(report, *table).panels for table in (("routing", "load"), ("expert_outputs", "similarity"))
    )
    assert load.last[1].shares.min() > 0.9
    assert similarity.last[1].low == 0.95


@pytest.mark.parametrize("table", ["domain_load", "missing"])
def test_tables_that_are_shown_elsewhere_or_nowhere_are_not_drawn(table):
    assert drawn_table(make_report(), "routing", table) is None
