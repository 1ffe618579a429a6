"""Charts: values lie where their axis says."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from upcycled_moe.analysis.report.charts import LayerChart, Series
from upcycled_moe.analysis.report.colors import color_at
from upcycled_moe.analysis.report.svg import bar_axis, grouped_bars, heat_map, line_chart
from upcycled_moe.analysis.report.tables import Grid
from upcycled_moe.analysis.results import Figure


FIGURE = Figure("entropy", "Entropy", "", "", "")


def _points(path: str) -> list[list[tuple[float, float]]]:
    """Return the points of each unbroken part of a line."""
    parts = []
    for command, x, y in re.findall(r"([ML])([\d.]+) ([\d.]+)", path):
        if command == "M":
            parts.append([])
        parts[-1].append((float(x), float(y)))
    return parts


def _labels(chart: ET.Element, style: str) -> dict[str, ET.Element]:
    return {each.text: each for each in chart.iter("text") if each.get("class") == style}


@pytest.fixture
def chart():
    series = [Series("a <b>", [0, 1, 2, 4], [0.0, 2.0, None, 1.0])]
    return ET.fromstring(line_chart(LayerChart(FIGURE, series)))


def test_lines_lie_on_their_axes(chart):
    bottom, top = (float(_labels(chart, "end")[text].get("y")) - 3.5 for text in ("0.0", "2.0"))
    left, right = (float(_labels(chart, "middle")[text].get("x")) for text in ("0", "4"))
    (first, second), (alone,) = _points(chart.find("g[@class='series s0']/path").get("d"))
    assert top < bottom
    assert first == pytest.approx((left, bottom), abs=0.1)
    assert second == pytest.approx((left + (right - left) / 4, top), abs=0.1)
    assert alone == pytest.approx((right, (top + bottom) / 2), abs=0.1)


def test_every_value_has_a_marker_that_tells_it(chart):
    titles = [circle.find("title").text for circle in chart.iter("circle")]
    assert titles == ["a <b>, layer 0: 0", "a <b>, layer 1: 2.00", "a <b>, layer 4: 1.00"]


def test_a_baseline_is_a_line_without_markers():
    series = [Series("a", [0, 1], [1.0, 1.0])]
    chart = ET.fromstring(line_chart(LayerChart(FIGURE, series, FIGURE, [Series("a", [0, 1], [0.0, 0.5])])))
    assert len(_points(chart.find("g[@class='baseline s0']/path").get("d"))[0]) == 2
    assert len(list(chart.iter("circle"))) == 2


def test_a_chart_without_numbers_is_empty():
    chart = ET.fromstring(line_chart(LayerChart(FIGURE, [Series("a", [3], [None])])))
    assert not list(chart.iter("circle"))


def _grid(values, as_image=False, rows=("a", "b"), columns=("0", "1", "2")):
    return Grid("domain", "expert", rows, columns, np.array(values, dtype=float), 0.0, 0.4, as_image)


def test_cells_lie_in_rows_and_columns_with_their_colors():
    chart = ET.fromstring(heat_map(_grid([[0.0, 0.2, 0.4], [None, 0.1, 0.3]]), "Weights"))
    cells = {cell.find("title").text: cell for cell in chart.iter("rect") if cell.get("fill")}
    assert len(cells) == 5
    first, other = cells["domain a, expert 0: 0"], cells["domain b, expert 2: 0.300"]
    assert (first.get("fill"), other.get("fill")) == (color_at(0.0), color_at(0.3 / 0.4))
    step, height = float(cells["domain a, expert 1: 0.200"].get("x")), float(other.get("y"))
    assert (first.get("x"), first.get("y")) == ("0.0", "0.0")
    assert float(other.get("x")) == pytest.approx(2 * step, abs=0.1)
    assert float(other.get("height")) == pytest.approx(height, abs=0.4)


def test_bars_have_the_height_of_their_values():
    values = [[0.1, 0.4], [0.2, None]]
    axis = bar_axis([0.1, 0.4, 0.2])
    chart = ET.fromstring(grouped_bars(_grid(values, columns=("0", "1")), axis, "Weights"))
    bars = {bar.find("title").text: bar for bar in chart.iter("rect")}
    assert bars.keys() == {"a, expert 0: 0.100", "a, expert 1: 0.400", "b, expert 0: 0.200"}
    assert float(bars["a, expert 1: 0.400"].get("y")) == pytest.approx(axis.end, abs=0.1)
    for title, bar in bars.items():
        assert float(bar.get("y")) + float(bar.get("height")) == pytest.approx(axis.start, abs=0.1)
        assert float(bar.get("height")) == pytest.approx(float(title[-5:]) / 0.4 * (axis.start - axis.end), abs=0.1)


def test_long_labels_are_cut_and_told_in_full():
    name = "a domain with a name that is long"
    chart = ET.fromstring(heat_map(_grid([[0.0] * 3] * 2, rows=(name, "b")), "Weights"))
    (label,) = (each for each in chart.iter("text") if each.text and each.text.endswith("…"))
    assert name.startswith(label.text[:-1])
    assert label.find("title").text == name
