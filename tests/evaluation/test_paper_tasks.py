import math

import pytest

from upcycled_moe.evaluation.results import Score
from upcycled_moe.evaluation.tasks import ABILITIES, OVERALL, PAPER_TASKS, average_score, averages, headline_metric


# Table 1 of arXiv 2509.00679: scratch, vanilla, Switch, LocMoE, MLP, Router Upcycling.
TABLE_1 = {
    "openbookqa": (31.4, 40.8, 27.6, 38.2, 37.6, 42.6),
    "openbookqa_fact": (34.4, 58.0, 23.6, 51.4, 55.0, 59.0),
    "arc_challenge": (27.12, 39.66, 14.58, 29.15, 34.92, 42.37),
    "arc_easy": (30.51, 52.73, 20.63, 45.68, 51.15, 58.02),
    "hellaswag": (41.45, 49.36, 25.24, 48.83, 49.70, 50.12),
    "winogrande": (52.57, 56.67, 48.22, 56.12, 58.88, 56.91),
    "boolq": (48.13, 49.88, 47.09, 54.19, 41.44, 55.84),
    "copa": (60, 62, 49, 61, 63, 64),
    "nq_open": (4.32, 4.85, 0.42, 4.04, 3.96, 5.15),
    "triviaqa": (17.74, 23.82, 5.24, 22.16, 24.17, 24.25),
}
TABLE_1_AVERAGES = {
    "Understanding": (32.90, 49.40, 25.60, 44.80, 46.30, 50.80),
    "Reasoning": (37.91, 49.61, 27.17, 44.95, 48.67, 51.86),
    "Knowledge": (32.55, 35.14, 25.44, 35.35, 33.14, 37.31),
    OVERALL: (34.76, 43.78, 26.17, 41.08, 41.98, 45.83),
}


@pytest.mark.parametrize("column", range(6))
def test_averages_are_those_of_the_papers_table(column):
    found = averages({task: Score(row[column], None) for task, row in TABLE_1.items()})
    assert list(found) == list(TABLE_1_AVERAGES)
    for name, average in found.items():
        assert average.score.value == pytest.approx(TABLE_1_AVERAGES[name][column], abs=0.0101)
        assert average.missing == []


def test_a_task_that_is_missing_is_named():
    found = averages({task: Score(0.5, 0.1) for task in PAPER_TASKS if task != "openbookqa_fact"})
    assert found["Understanding"].tasks == ["openbookqa"]
    assert found["Understanding"].missing == found[OVERALL].missing == ["openbookqa_fact"]
    assert found["Reasoning"].missing == []


def test_other_tasks_have_no_abilities():
    found = averages({"arc_easy": Score(0.2, 0.1), "piqa": Score(0.6, 0.1)})
    assert list(found) == [OVERALL]
    assert found[OVERALL].score.value == pytest.approx(0.4)


def test_abilities_without_a_task_are_left_out():
    assert list(averages({"boolq": Score(0.6, 0.1)})) == ["Knowledge", OVERALL]
    assert averages({}) == {}


def test_error_of_an_average_of_independent_tasks():
    average = average_score([Score(0.2, 0.03), Score(0.6, 0.04)])
    assert average.value == pytest.approx(0.4)
    assert average.stderr == pytest.approx(math.sqrt(0.03**2 + 0.04**2) / 2)
    assert average_score([Score(0.2, 0.03), Score(0.6, None)]).stderr is None


@pytest.mark.parametrize(
    ("task", "metrics", "expected"),
    [
        ("arc_challenge", ("acc", "acc_norm"), "acc_norm"),
        ("arc_easy", ("acc", "acc_norm"), "acc"),
        ("boolq", ("acc",), "acc"),
        ("nq_open", ("exact_match",), "exact_match"),
        ("wikitext", ("word_perplexity", "bits_per_byte"), "word_perplexity"),
    ],
)
def test_figure_that_stands_for_a_task(task, metrics, expected):
    assert headline_metric(task, metrics) == expected


def test_every_task_has_one_ability():
    assert len(PAPER_TASKS) == len(set(PAPER_TASKS)) == 10
    assert set(PAPER_TASKS) == set(TABLE_1) == {task for tasks in ABILITIES.values() for task in tasks}
