from functools import partial

import datasets
import lm_eval.tasks
import pytest

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.evaluation import harness
from upcycled_moe.evaluation.harness import load_tasks
from upcycled_moe.evaluation.tasks import PAPER_TASKS


@pytest.fixture
def small_index(monkeypatch):
    """An index of our tasks alone, where all of the harness's would be read, which takes ten seconds."""
    manager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness.lm_eval.tasks, "TaskManager", manager)
    monkeypatch.setattr(harness, "_PAPER_TASK_FOLDERS", ())


def test_the_harness_has_the_paper_s_tasks():
    index = harness._task_manager().task_index
    assert index["router_upcycling"].cfg["task"] == list(PAPER_TASKS)
    assert set(PAPER_TASKS) <= set(index)


def test_a_question_follows_its_fact(monkeypatch):
    item = {
        "question_stem": "Frilled sharks live",
        "choices": {"text": ["deep", "in trees"], "label": ["A", "B"]},
        "answerKey": "A",
        "fact1": "deep sea animals live deep in the ocean",
    }
    asked = []

    def load_dataset(path, name, **_):
        asked.append((path, name))
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list([item]) for split in ("train", "validation", "test")}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_tasks(["openbookqa_fact"]).tasks["openbookqa_fact"]
    assert asked == [("allenai/openbookqa", "additional")]
    task.build_all_requests()
    prompt = "deep sea animals live deep in the ocean\nFrilled sharks live"
    assert [instance.args for instance in task.instances] == [(prompt, " deep"), (prompt, " in trees")]
    assert task.doc_to_target(item) == 0
    assert set(task.aggregation()) == {"acc", "acc_norm"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [("openbookqa_fakt", "did you mean 'openbookqa_fact'?"), ("zebra", "`lm-eval ls tasks` lists them.")],
)
def test_a_task_that_nobody_has(small_index, name, hint):
    with pytest.raises(SettingsError, match=f"^{name}: no such task in lm-evaluation-harness; ") as caught:
        load_tasks([name])
    assert str(caught.value).endswith(hint)


def test_without_the_hub_it_names_the_way_out(monkeypatch):
    def load_dataset(path, name, **_):
        raise ConnectionError(f"couldn't reach {path}\nand more of it")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SettingsError, match=r"ConnectionError: couldn't reach aps/super_glue\); .* --offline-data"):
        load_tasks(["copa"])


@pytest.mark.slow
def test_every_task_of_the_harness_can_be_named():
    with pytest.raises(SettingsError, match=r"^winogrand: no such task .* did you mean 'winogrande'"):
        load_tasks(["winogrand"])


@pytest.mark.network
def test_the_papers_tasks_are_on_the_hub():
    loaded = load_tasks(["router_upcycling"])
    assert list(loaded.tasks) == list(PAPER_TASKS)
    assert len(loaded.tasks["openbookqa_fact"].eval_docs) == len(loaded.tasks["openbookqa"].eval_docs) == 500
