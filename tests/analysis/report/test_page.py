"""`report.html`: whole, by itself, safe, and with every figure and its definition."""

import re
from html.parser import HTMLParser

import pytest
from synthetic_reports import make_report

from upcycled_moe.analysis.measures import MEASURES
from upcycled_moe.analysis.report.page import render_page
from upcycled_moe.analysis.results import MeasureResult
from upcycled_moe.analysis.saturation import FIGURES as COMPARISON_FIGURES


VOID = {"meta", "input", "br", "hr", "img", "link"}
# Of SVG, closed at once.
SELF_CLOSING = {"path", "circle", "rect", "line", "image"}


class _Page(HTMLParser):
    """What tests ask of a page; it fails where tags do not nest."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in SELF_CLOSING
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def attributes(self, name: str) -> list[tuple[str, str]]:
        return [(tag, attributes[name]) for tag, attributes in self.tags if name in attributes]


@pytest.fixture(scope="module")
def page():
    return _Page(render_page(make_report()))


def test_needs_nothing_from_elsewhere(page):
    assert {value[:10] for _, value in page.attributes("src")} == set()
    for tag, target in page.attributes("href"):
        if tag == "a":
            assert target.startswith(("#", "https://arxiv.org/abs/")), target
        else:
            assert tag == "image"
            assert target.startswith("data:image/png;base64,")
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not re.search(r"@import|url\(", "".join(page.text))


def test_links_lead_to_sections(page):
    ids = [value for _, value in page.attributes("id")]
    assert len(ids) == len(set(ids))
    assert {target[1:] for _, target in page.attributes("href") if target.startswith("#")} == set(ids)


def test_shows_every_figure_with_its_definition(page):
    text = " ".join(" ".join(page.text).split())
    figures = [figure for measure in MEASURES for figure in measure.figures] + list(COMPARISON_FIGURES)
    for figure in figures:
        assert " ".join(figure.title.split()) in text
        assert " ".join(figure.formula.split()) in text
        assert " ".join(figure.meaning.split()) in text


def test_papers_are_linked(page):
    links = {target for tag, target in page.attributes("href") if tag == "a" and "arxiv" in target}
    assert {"https://arxiv.org/abs/2509.00679", "https://arxiv.org/abs/2409.02060"} <= links


HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\'{{ 7 * 7 }}'


def test_hostile_names_stay_text():
    report = make_report(names=(HOSTILE, "second"), domains=(HOSTILE, "code"))
    routing = report.checkpoints[0].measures["routing"]
    routing.notes.append(HOSTILE)
    routing.per_layer[HOSTILE] = [1.0, 2.0, 3.0]
    report.checkpoints[0].measures[HOSTILE] = MeasureResult(per_layer={"figure": [1.0, 2.0, 3.0]})
    report.checkpoints[0].measures["vocabulary"].tables["tokens"][-1][0][0]["token"] = HOSTILE
    report.settings[HOSTILE] = [HOSTILE]
    page = _Page(render_page(report))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not page.attributes("onerror")
    assert "{{ 7 * 7 }}" in "".join(page.text)


def test_both_themes_define_every_variable():
    page = render_page(make_report())
    style = page[page.index("<style>") : page.index("</style>")]
    in_dark = r"@media \(prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}"
    dark, light = "".join(re.findall(in_dark, style, re.DOTALL)), re.sub(in_dark, "", style, flags=re.DOTALL)
    used = set(re.findall(r"var\((--[\w-]+)\)", style))
    assert used == set(re.findall(r"(--[\w-]+):", light)) == set(re.findall(r"(--[\w-]+):", dark))


def test_every_style_of_a_series_has_a_color():
    page = render_page(make_report(names=[f"run {number}" for number in range(13)]))
    style = page[page.index("<style>") : page.index("</style>")]
    for name in set(re.findall(r'class="(?:swatch )?(?:series|bars|baseline) (\w+)"', page)):
        assert re.search(rf"\.{name}\b[^{{]*{{ color: var\(--", style), name


def test_notes_name_their_checkpoints_unless_all_have_them():
    report = make_report()
    for checkpoint in report.checkpoints:
        checkpoint.measures["routing"].notes.append("Said of all.")
    report.checkpoints[1].measures["routing"].notes.append("Said of one.")
    notes = re.findall(r'<p class="note">(.*?)</p>', render_page(report))
    assert notes == ["Said of all.", "second: Said of one."]


def test_notes_on_comparisons_stand_there_even_if_nothing_is_compared():
    report = make_report()
    report.comparisons, report.comparison_notes = [], ["They differ in tokens."]
    page = render_page(report)
    assert page.index('<section id="comparisons">') < page.index('<p class="note">They differ in tokens.</p>')
    assert '<a href="#comparisons">' in page


def test_missing_numbers_leave_gaps_and_dashes():
    report = make_report(names=("only",))
    report.checkpoints[0].measures["routing"].per_layer["entropy"] = [None, 0.5, None]
    report.checkpoints[0].measures["routing_weights"].tables["weights"][0] = [[None] * 4] * 2
    page = _Page(render_page(report))
    assert "only, layer 1: 0.500" in page.text
    assert page.text.count("–") >= 4


@pytest.mark.parametrize(
    "shape",
    [
        {"names": ("one",), "num_layers": 1, "domains": ("text",)},
        {"num_experts": 1, "num_experts_per_tok": 1},
        {"num_layers": 2, "num_experts": 128, "domains": [f"domain {number}" for number in range(11)]},
    ],
)
def test_any_shape_gives_a_whole_page(shape):
    _Page(render_page(make_report(**shape)))


def test_pages_of_many_layers_and_experts_stay_small():
    page = render_page(make_report(names=("a", "b", "c"), num_layers=24, num_experts=64))
    assert "<image " in page
    assert len(page) < 3_500_000


def test_tables_of_unknown_measures_are_drawn_by_their_shape_or_left_out():
    report = make_report(names=("only",))
    tables = {
        "matrix": [[0.1, 0.2, 0.3, 0.4]] * 3,
        "ragged": [[1.0], [1.0, 2.0]],
        "words": ["a", "b", "c"],
        "mapping": {"a": 1.0},
        "other_shape": [[1.0, 2.0]] * 2,
    }
    report.checkpoints[0].measures["future"] = MeasureResult(tables=tables)
    page = "".join(_Page(render_page(report)).text)
    assert "Matrix" in page
    assert not any(title in page for title in ("Ragged", "Words", "Mapping", "Other shape"))
