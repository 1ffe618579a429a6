"""PNGs of the main charts."""

import re

import numpy as np
import pytest
from synthetic_reports import make_report

from upcycled_moe.analysis.report import pictures
from upcycled_moe.analysis.report.pictures import write_pictures
from upcycled_moe.analysis.report.styles import series_color, style_rules


pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")


def test_each_picture_is_there_with_a_white_background(tmp_path):
    write_pictures(make_report(names=("a $x_$", "b")), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("overview.png", "routing_weights.png", "load.png", "co_activation.png"),
        *("expert_output_similarity.png", "parent_divergence.png", "router_saturation.png"),
    }
    for name in names:
        pixels = np.array(image_module.open(tmp_path / name).convert("RGB"))
        height, width = pixels.shape[:2]
        assert width >= 700, name
        assert height >= 300, name
        assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all(), name
        assert pixels.std() > 10, name


def test_nothing_is_drawn_of_what_is_not_there(tmp_path):
    report = make_report(names=("a",), num_layers=1)
    report.checkpoints[0].measures = {"routing": report.checkpoints[0].measures["routing"]}
    report.checkpoints[0].measures["routing"].tables = {}
    write_pictures(report, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"overview.png"}


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """`drawn(report)`: the figures by file, as they are saved."""

    def draw(report):
        figures = {}
        monkeypatch.setattr(pictures, "save_png", lambda figure, path: figures.update({path.name: figure}))
        write_pictures(report, tmp_path)
        return figures

    return draw


def test_figures_that_no_checkpoint_has_leave_no_empty_charts(drawn):
    report = make_report()
    for checkpoint in report.checkpoints:
        checkpoint.measures["expert_weights"].per_layer["parent_divergence"] = [None] * 3
    for comparison in report.comparisons:
        comparison.per_layer["router_saturation"] = [None] * 3
    figures = drawn(report)
    assert "overview.png" in figures
    assert not {"parent_divergence.png", "router_saturation.png"} & figures.keys()
    titles = [axes.get_title(loc="left") for axes in figures["overview.png"].axes if axes.get_visible()]
    assert len(titles) == 5
    assert "Divergence from the parent" not in titles


def test_legends_show_every_name(drawn):
    figures = drawn(make_report(names=("_first", "second $x"), domains=("_math", "code")))
    (legend,) = figures["overview.png"].legends
    assert [text.get_text() for text in legend.get_texts()] == ["_first", r"second \$x"]
    assert [line.get_color() for line in legend.get_lines()] == [series_color(0), series_color(1)]
    legend = figures["routing_weights.png"].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["_math", "code"]


def test_tables_of_many_checkpoints_are_drawn_in_rows(drawn):
    figure = drawn(make_report(names=[f"run {number}" for number in range(7)]))["routing_weights.png"]
    width, height = figure.get_size_inches()
    assert width < 20
    assert height > 9
    assert sum(axes.get_visible() for axes in figure.axes) == 7


def test_lines_look_alike_on_the_page_and_in_pictures(drawn):
    figures = drawn(make_report(names=[f"run {number}" for number in range(12)]))
    lines = figures["expert_output_similarity.png"].axes[0].lines
    assert len(lines) == 12
    rules = style_rules()
    light, looks = rules[: rules.index("@media")], set()
    for number, line in enumerate(lines):
        (variable,) = re.findall(rf"\.s{number} {{ color: var\((.*)\); }}", rules)
        dashes = re.findall(rf"\.series\.s{number} path {{ stroke-dasharray: (.*); }}", rules)
        assert f"{variable}: {line.get_color()};" in light
        assert line.is_dashed() == bool(dashes)
        looks.add((variable, *dashes))
    assert len(looks) == 12
