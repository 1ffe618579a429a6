import pyarrow
import pyarrow.parquet
import pytest
from benchmark_items import MULTIPLE_CHOICE, OPEN_QA, write_items

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.evaluation.harness import load_tasks
from upcycled_moe.evaluation.offline_data import read_offline_data


# What the harness's own tasks make of the items: the first prompt, and the answers that it scores.
PROMPTS = {
    "openbookqa": ("There is fog around:", [" a marsh", " a tundra far away", " it", " the"], 0),
    "arc_easy": ("Question: What is it for?\nAnswer:", [" that", " life in the water", " soil"], 1),
    "arc_challenge": ("Question: Which is it?\nAnswer:", [" a", " the other one", " from", " had it"], 2),
    "hellaswag": (
        "Brushing teeth: The girl turns on the faucet. She turns it off. The girl in rome",
        [" was in it.", " had to.", " is for the.", " brushes this and that."],
        3,
    ),
    "boolq": ("It -- This is it.\nQuestion: is this it?\nAnswer:", [" no", " yes"], 1),
}


@pytest.fixture(scope="module")
def tasks(items):
    return load_tasks(["router_upcycling"], items).tasks


def requests(task, number=0):
    """Return the prompts and answers of an item."""
    task.build_all_requests()
    return [instance.args for instance in task.instances if instance.doc_id == number]


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_and_answers_are_the_harness_s(tasks, name):
    prompt, answers, right = PROMPTS[name]
    assert requests(tasks[name]) == [(prompt, answer) for answer in answers]
    assert tasks[name].doc_to_target(tasks[name].eval_docs[0]) == right


def test_a_wikihow_item_has_no_fragment_to_capitalize(tasks):
    assert requests(tasks["hellaswag"], 1)[0] == ("Style: How to apply it. Apply a coat in Rome.", " Let it dry.")


def test_winogrande_scores_what_follows_each_name(tasks):
    task = tasks["winogrande"]
    begin = "Ian had it and Craig had not because"
    assert requests(task) == [(f"{begin} {name}", " was in the car.") for name in ("Ian", "Craig")]
    assert [task.doc_to_text(item) for item in task.eval_docs] == [0, 1]


def test_copa_goes_on_with_because_or_therefore(tasks):
    # Two spaces: the harness puts one, and the answer brings one.
    assert requests(tasks["copa"])[1] == ("The woman refused it because", "  she had that for the night.")
    assert requests(tasks["copa"], 1)[0] == ("The climbers had it therefore", "  they were in it.")
    assert tasks["copa"].doc_to_target(tasks["copa"].eval_docs[0]) == " she had that for the night."


def test_open_questions_are_answered_up_to_a_stop_sign(tasks):
    [(prompt, settings)] = requests(tasks["nq_open"])
    assert prompt == "Answer these questions:\n\nQ: who was it?\nA:"
    assert settings["until"] == ["\n", ".", ","]
    assert not settings["do_sample"]
    [(prompt, _)] = requests(tasks["triviaqa"])
    assert prompt == "Question: Who was in it??\nAnswer:"
    assert tasks["triviaqa"].doc_to_target(tasks["triviaqa"].eval_docs[0]) == ["Samuel", "Dr. Samuel"]


def test_the_task_without_data_is_left_out_and_named(items):
    loaded = load_tasks(["router_upcycling"], items)
    assert loaded.left_out == ("openbookqa_fact",)
    assert list(loaded.tasks) == [
        "openbookqa", "arc_challenge", "arc_easy", "hellaswag", "winogrande", "boolq", "copa", "nq_open", "triviaqa"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["openbookqa_fact", "piqa"])
def test_a_task_that_is_asked_for_by_name_must_be_there(items, name):
    with pytest.raises(SettingsError, match=f"{name}: not in the offline data of .*; there are openbookqa, arc_easy"):
        load_tasks([name], items)


def test_one_file_is_enough(tmp_path):
    folder = write_items(tmp_path, {"boolq": MULTIPLE_CHOICE["boolq"]})
    assert list(load_tasks(["router_upcycling"], folder).tasks) == ["boolq"]


def test_errors_name_the_file(tmp_path):
    with pytest.raises(SettingsError, match=r"holds neither multiple_choice\.parquet nor open_qa\.parquet"):
        read_offline_data(tmp_path)
    (tmp_path / "open_qa.parquet").write_text("no parquet")
    with pytest.raises(SettingsError, match=r"open_qa\.parquet: not a readable parquet file"):
        read_offline_data(tmp_path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"task": "nq_open"}]), tmp_path / "open_qa.parquet")
    with pytest.raises(
        SettingsError, match=r"open_qa\.parquet: no column 'question'; it needs task, question, answers"
    ):
        read_offline_data(tmp_path)


def test_an_item_without_its_answer_is_an_error(tmp_path):
    broken = {**MULTIPLE_CHOICE["openbookqa"][0], "answer": 4}
    folder = write_items(tmp_path, {"openbookqa": [MULTIPLE_CHOICE["openbookqa"][1], broken]}, OPEN_QA)
    with pytest.raises(SettingsError, match="row 1 is no item of openbookqa"):
        read_offline_data(folder)
