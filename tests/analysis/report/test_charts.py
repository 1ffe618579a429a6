"""What is drawn over the layers, and listed beside it."""

from synthetic_reports import make_report

from upcycled_moe.analysis.report.charts import comparison_charts, measure_charts
from upcycled_moe.analysis.report.listings import listings
from upcycled_moe.analysis.report.summary import summary


def test_what_the_loads_alone_give_is_drawn_with_its_figure():
    report = make_report()
    rows = [row for row in summary(report) if row.measure == "co_activation"]
    (chart,) = measure_charts(report, rows)
    assert (chart.figure.name, chart.baseline.name) == ("co_activation", "co_activation_by_load")
    per_layer = report.checkpoints[1].measures["co_activation"].per_layer
    assert chart.series[1].values == per_layer["co_activation"]
    assert chart.baselines[1].values == per_layer["co_activation_by_load"]


def test_comparisons_have_a_line_a_pair():
    report = make_report(names=("a", "b", "c"))
    (chart,) = comparison_charts(report)
    assert [series.name for series in chart.series] == ["a and b", "a and c", "b and c"]
    assert chart.baseline.name == "router_saturation_by_load"


def test_listings_tell_their_checkpoint_and_means_over_layers():
    report = make_report()
    tables = report.checkpoints[1].measures["local_consistency"].tables
    tables["srp"] = [[0.25, None], [0.5, None], [0.75, None]]
    made = listings(report, "local_consistency")
    assert [(listing.number, listing.name) for listing in made] == [(0, "first"), (1, "second")]
    assert [row[:2] for row in made[1].rows] == [["4", "0.500"], ["16", "–"]]


def test_white_space_of_tokens_can_be_seen():
    (first, _) = listings(make_report(num_experts=2), "vocabulary")
    token = '<code class="token" title="0.900 of 1,200 occurrences">␣the⏎</code>'
    assert first.rows == [["0", token], ["1", token]]
