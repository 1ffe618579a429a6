import socket
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


def test_a_tag_has_all_of_its_tasks(monkeypatch, tmp_path):
    """The tag is one of `boolq` and `copa` too; alone, they are not what it means."""
    tag = "super-glue-lm-eval-v1"
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ntag: {tag}\ndataset_path: nobody/{name}\noutput_type: multiple_choice\n"
            "test_split: test\ndoc_to_text: '{{question}}'\ndoc_to_choice: ['no', 'yes']\ndoc_to_target: label\n"
        )
    manager = lm_eval.tasks.TaskManager

    def whole_index(include_path, include_defaults=True):
        return manager(include_path=tmp_path if include_defaults else include_path, include_defaults=False)

    row = {"question": "is it", "label": 1}
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", whole_index)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda **_: datasets.DatasetDict({"test": datasets.Dataset.from_list([row])})
    )
    assert set(load_tasks([tag]).tasks) == {"one", "two"}


def fail_with(monkeypatch, error):
    def load_dataset(path, name, **_):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_without_the_hub_it_names_the_way_out(monkeypatch):
    fail_with(monkeypatch, ConnectionError("couldn't reach aps/super_glue\nand more of it"))
    with pytest.raises(SettingsError, match=r"ConnectionError: couldn't reach aps/super_glue\); .* --offline-data\.$"):
        load_tasks(["copa"])


def test_a_name_that_is_not_resolved_is_the_network_too(monkeypatch):
    error = RuntimeError("cannot send a request")
    error.__cause__ = socket.gaierror("name or service not known")
    fail_with(monkeypatch, error)
    with pytest.raises(SettingsError, match=r"cannot be reached \(RuntimeError: .* --offline-data\.$"):
        load_tasks(["copa"])


def test_what_fails_otherwise_is_called_by_its_name(monkeypatch):
    fail_with(monkeypatch, ImportError("No module named 'sacrebleu'"))
    with pytest.raises(SettingsError) as caught:
        load_tasks(["copa"])
    assert str(caught.value) == "copa: this task cannot be loaded (ImportError: No module named 'sacrebleu')."


@pytest.mark.slow
def test_every_task_of_the_harness_can_be_named():
    with pytest.raises(SettingsError, match=r"^winogrand: no such task .* did you mean 'winogrande'"):
        load_tasks(["winogrand"])


@pytest.mark.network
def test_the_papers_tasks_are_on_the_hub():
    loaded = load_tasks(["router_upcycling"])
    assert list(loaded.tasks) == list(PAPER_TASKS)
    assert len(loaded.tasks["openbookqa_fact"].eval_docs) == len(loaded.tasks["openbookqa"].eval_docs) == 500
