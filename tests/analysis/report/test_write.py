"""The folder of a report."""

import json
import math
from html import unescape

import pytest
from synthetic_reports import make_report

from upcycled_moe.analysis.report import write, write_report
from upcycled_moe.analysis.report.json_file import format_json, rounded
from upcycled_moe.analysis.results import AnalysisReport


@pytest.fixture
def without_matplotlib(monkeypatch):
    monkeypatch.setattr(write, "can_draw", lambda: False)


def test_report_json_can_be_read_back(tmp_path, without_matplotlib):
    report = make_report()
    write_report(report, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    read = AnalysisReport.from_dict(content)
    assert read.to_dict() == content
    assert [checkpoint.name for checkpoint in read.checkpoints] == ["first", "second"]
    load, before = (each.checkpoints[0].measures["routing"].tables["load"] for each in (read, report))
    assert load[2] == pytest.approx(before[2], rel=1e-5)


def test_without_matplotlib_the_page_is_whole_and_tells_of_the_pictures(tmp_path, without_matplotlib):
    write_report(make_report(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.json"}
    page = unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.rstrip().endswith("</html>")
    assert "pip install 'upcycled-moe[plots]'" in page


def test_what_is_no_number_is_left_out_everywhere(tmp_path, without_matplotlib):
    report = make_report(names=("only",))
    report.checkpoints[0].measures["routing"].per_layer["entropy"] = [math.nan, math.inf, 1.0]
    write_report(report, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert content["checkpoints"][0]["measures"]["routing"]["per_layer"]["entropy"] == [None, None, 1.0]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert ">nan<" not in page.lower()


def test_numbers_are_rounded_to_six_digits():
    assert rounded({"a": [1 / 3, 1234567.8], "b": (True, 3, "x", None)}) == {
        "a": [0.333333, 1234570.0],
        "b": [True, 3, "x", None],
    }


def test_rows_stand_on_lines_of_their_own():
    content = {"a": {"b": [[1, 2.5], [None, "é"]], "c": []}, "d": {"e": 1}}
    text = format_json(content)
    assert json.loads(text) == content
    assert text.splitlines() == [
        "{",
        ' "a": {',
        '  "b": [',
        "   [1, 2.5],",
        '   [null, "é"]',
        "  ],",
        '  "c": []',
        " },",
        ' "d": {"e": 1}',
        "}",
    ]
