"""Each figure of the measures has a name of its own, and its definition in the documentation."""

import re
from collections import Counter
from pathlib import Path

import pytest

from upcycled_moe.analysis import saturation
from upcycled_moe.analysis.measures import MEASURES


FIGURES = [*(figure for measure in MEASURES for figure in measure.figures), *saturation.FIGURES]
DOCUMENTATION = Path(__file__).parents[3] / "docs" / "measures.md"


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_figures_stand_in_the_documentation_as_they_do_in_the_report(figure):
    text = " ".join(DOCUMENTATION.read_text(encoding="utf-8").split())
    source = figure.source[0].upper() + figure.source[1:]

    assert f"**{figure.title}** (`{figure.name}`): `{figure.formula}`. {figure.meaning} *{source}.*" in text


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_definitions_are_complete(figure):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", figure.name)
    assert all((figure.title, figure.meaning, figure.source))


def test_names_are_unique():
    for names in (Counter(measure.name for measure in MEASURES), Counter(figure.name for figure in FIGURES)):
        assert max(names.values()) == 1, names
