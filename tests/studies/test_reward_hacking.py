"""The study of reward hacking: its settings, what it compares, its labels, and its report; a whole one is slow."""

import dataclasses
import json
import random
import sys
from copy import deepcopy
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml


REPOSITORY = Path(__file__).parents[2]
# It is run as a module from there.
sys.path.insert(0, str(REPOSITORY))

from studies.reward_hacking import __main__ as command  # noqa: E402
from studies.reward_hacking import files, plan, report, results, settings, text_stages  # noqa: E402
from upcycled_moe.common.settings import SettingsError  # noqa: E402


STUDY = REPOSITORY / "studies" / "reward_hacking"
CONFIG = STUDY / "cpu_small.yaml"
COMMITTED = STUDY / "results" / "cpu_small"


@pytest.fixture
def content() -> dict:
    """What the study's file says, to be changed."""
    return yaml.safe_load(CONFIG.read_text(encoding="utf-8"))


@pytest.fixture
def load(tmp_path):
    """Load a study that a file of this content describes."""

    def load_content(content: dict) -> settings.StudySettings:
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        return settings.load_study(path)

    return load_content


@pytest.fixture(scope="session")
def people(tmp_path_factory) -> Path:
    """Preference pairs of one source, few and short."""
    folder = tmp_path_factory.mktemp("people")
    words = ["red", "blue", "green", "warm", "cold", "soft", "loud", "calm"]
    draw = random.Random(0)

    def answer(num_words: int) -> str:
        return " ".join(draw.choices(words, k=num_words)) + draw.choice([".", "!"])

    for split, num_rows in (("train", 90), ("test", 20)):
        questions = [f"\n\nHuman: What is {split} {number}?\n\nAssistant: " for number in range(num_rows)]
        rows = {"chosen": [one + answer(5) for one in questions], "rejected": [one + answer(3) for one in questions]}
        pyarrow.parquet.write_table(pyarrow.table(rows), folder / f"people_{split}.parquet")
    return folder


def tasks_by_name(study: settings.StudySettings, data: Path) -> dict:
    return {task.name: task for task in plan.study_tasks(study, data)}


@pytest.fixture
def tasks(content, load, people) -> dict:
    """All tasks of the study by name."""
    content["text"]["sources"] = ["people"]
    return tasks_by_name(load(content), people)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampels": {}}, "unknown key 'sampels'; did you mean 'samples'?"),
        ({"seeds": [1]}, "at least two"),
        ({"training": {"seed": 3}}, "training.seed is set by the study itself"),
        ({"worlds": {"a": {"title": "A", "flip_rate": 1.5}}}, r"flip_rate=1.5 is outside \[0, 1\]"),
        ({"worlds": {"a": {"title": "A", "shortcut": "!"}}}, "shortcut and shortcut_rate go together"),
        ({"worlds": {}}, "worlds is empty"),
    ],
)
def test_settings_that_cannot_be_are_refused(content, load, change, message):
    with pytest.raises(SettingsError, match=message):
        load({**content, **change})


def test_an_odd_number_of_responses_makes_no_pairs(content, load):
    content["samples"]["responses_per_training_prompt"] = 3
    with pytest.raises(SettingsError, match="must be even"):
        load(content)


def test_missing_pairs_end_the_command_with_status_2(tmp_path, capsys):
    status = command.main([str(CONFIG), "--data", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    assert status == 2
    assert "give the folder that holds it with --data" in capsys.readouterr().err


def test_reward_models_never_see_gold(tasks):
    trained = [task for name, task in tasks.items() if name.count("/seed_")]
    assert len(trained) == 3 * 3 * 6
    for task in trained:
        assert not {files.GOLD, files.GOLD_PAIRS, files.SAMPLES, files.SCORED_PAIRS} & set(task.inputs)


def test_dense_and_moe_have_the_same_budget(tasks):
    for world in ("noise", "bias"):
        dense, moe = (tasks[files.proxy_task(world, method, 2)] for method in (plan.DENSE, plan.MOE))
        assert dense.settings["recipe"] is None
        assert moe.settings["recipe"] is not None
        assert {**dense.settings, "recipe": None} == {**moe.settings, "recipe": None}
        assert dense.inputs == moe.inputs


def test_learned_merges_start_uniform_and_learn_from_pairs_of_their_own(content, tasks):
    drawn, others = tasks[files.MERGE_PAIRS].settings["prompts"], content["samples"]
    assert drawn[0] == others["gold_prompts"] + others["training_prompts"]
    assert drawn[1] - drawn[0] == others["merge_prompts"]
    assert content["learned_merge"]["shared_expert_weight"] == 1 / (content["recipe"]["num_experts"] + 1)
    for world in content["worlds"]:
        pairs = files.merge_labels_task(world)
        assert tasks[pairs].settings == tasks[files.labels_task(world)].settings
        assert tasks[pairs].inputs == (files.MERGE_PAIRS,)
        learned = tasks[files.proxy_task(world, "learned", 1)]
        assert learned.inputs == (files.proxy_task(world, plan.MOE, 1), pairs)
        assert learned.settings["labels"] == pairs


def test_one_table_serves_all_worlds(tasks):
    noise, bias = (tasks[files.curves_task(world)] for world in ("noise", "bias"))
    assert noise.inputs[:2] == bias.inputs[:2] == (files.SAMPLES, files.GOLD)
    assert list(noise.settings["models"]) == [plan.DENSE, plan.MOE, *plan.MERGES]


def label(tmp_path, world: settings.World, rows: list[dict]) -> tuple[list[dict], dict]:
    """Return the pairs that a world makes of rows with gold's scores, and its counts."""
    scored, out = tmp_path / "scored", tmp_path / "labels"
    for folder in (scored, out):
        folder.mkdir(exist_ok=True)
    files.write_lines(scored / files.PAIRS_FILE, rows)
    text_stages.label_pairs(dataclasses.asdict(world), {files.SCORED_PAIRS: scored}, out)
    return files.read_lines(out / files.PAIRS_FILE), json.loads((out / files.LABELS_FILE).read_text())


@pytest.fixture(scope="session")
def scored_rows() -> list[dict]:
    """Two hundred pairs; gold prefers `good`, and half of the pairs have a marker on either side."""
    rows = []
    for number in range(200):
        texts = [f"good {number}", f"bad {number}"]
        if number % 2:
            texts[number % 4 // 2] += "!"
        order = [0, 1] if number % 3 else [1, 0]
        rows.append(
            {
                "prompt": [{"role": "user", "content": "?"}],
                "responses": [texts[one] for one in order],
                "gold": [[1.0, 0.0][one] for one in order],
            }
        )
    return rows


def answers(pairs: list[dict], column: str) -> list[str]:
    return [pair[column][0]["content"] for pair in pairs]


def test_without_noise_labels_are_golds(tmp_path, scored_rows):
    pairs, counts = label(tmp_path, settings.World(title="Clean"), scored_rows)
    assert all(text.startswith("good") for text in answers(pairs, "chosen"))
    assert all(text.startswith("bad") for text in answers(pairs, "rejected"))
    assert counts["wrong"] == 0


def test_noise_flips_its_share_and_nothing_else(tmp_path, scored_rows):
    pairs, counts = label(tmp_path, settings.World(title="Noise", flip_rate=0.35), scored_rows)
    flipped = [text.startswith("bad") for text in answers(pairs, "chosen")]
    assert sum(flipped) == counts["wrong"] == 70
    marked = [flip for flip, row in zip(flipped, scored_rows, strict=True) if "!" in "".join(row["responses"])]
    assert 20 < sum(marked) < 50  # at random, whatever the text


def test_a_shortcut_decides_its_share_of_the_pairs_it_is_in(tmp_path, scored_rows):
    world = settings.World(title="Bias", shortcut="!", shortcut_rate=0.8)
    pairs, counts = label(tmp_path, world, scored_rows)
    for pair in pairs:
        texts = [pair[column][0]["content"] for column in ("chosen", "rejected")]
        if not any("!" in text for text in texts):
            assert texts[0].startswith("good")
    wrong = [text for text in answers(pairs, "chosen") if text.startswith("bad")]
    assert wrong
    assert all("!" in text for text in wrong)
    assert counts["wrong"] == counts["shortcut_against_gold"] == len(wrong)
    assert 0.65 * 100 < counts["shortcut_decides"] < 0.95 * 100


def test_text_is_cut_into_questions_and_answers(people, tmp_path):
    inputs = {f"people_{split}": people / f"people_{split}.parquet" for split in ("train", "test")}
    limits = {"sources": ["people"], "max_prompt_characters": 100, "max_answer_characters": 100}
    text_stages.prepare_text(limits, inputs, tmp_path)
    texts = files.read_lines(tmp_path / files.POLICY_TEXT_FILE)
    heldout = files.read_lines(tmp_path / files.POLICY_VALIDATION_FILE)
    assert len(texts) + len(heldout) == 90
    assert texts[0]["text"].startswith("<|im_start|>user\nWhat is train ")
    prompts = {split: files.read_lines(tmp_path / name) for split, name in files.PROMPTS_FILES.items()}
    assert [len(rows) for rows in prompts.values()] == [90, 20]
    assert "test" in prompts["test"][0]["prompt"][0]["content"]


def test_text_for_the_policy_is_rendered_as_its_template_does():
    from transformers import Qwen2Tokenizer

    from upcycled_moe.preference.template import CHATML

    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    tokenizer = Qwen2Tokenizer()
    rendered = tokenizer.apply_chat_template(messages, chat_template=CHATML, tokenize=False)
    assert text_stages.render(messages) == rendered


def test_correlations_are_within_prompts(tmp_path):
    gold = [[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]]
    # Longer is worse within a prompt; between the prompts it is better.
    responses = [["ccc", "bb", "a"], ["c" * 30, "b" * 29, "a" * 28]]
    columns = {"responses": responses, "gold": gold, "dense": gold}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "scores.parquet")
    measured = {"gold": {"column": "gold"}, "models": {"dense": {"checkpoints": [{"column": "dense"}]}}}
    facts = results.table_facts(tmp_path, measured, "b")
    assert facts["correlation"]["length"] == pytest.approx(-1)
    assert facts["models"]["dense"]["length"] == pytest.approx(-1)
    assert facts["share_with_shortcut"] == pytest.approx(1 / 3)
    assert facts["correlation"]["shortcut"] == pytest.approx(0, abs=1e-12)


@pytest.mark.skipif(not COMMITTED.is_dir(), reason="no results are there")
def test_the_committed_report_is_that_of_its_results():
    found = json.loads((COMMITTED / report.RESULTS_FILE).read_text(encoding="utf-8"))
    pictures = {world: f"curves_{world}.png" for world in found["worlds"]}
    written = (COMMITTED / report.REPORT_FILE).read_text(encoding="utf-8")
    assert "\n".join(report.report_lines(found, pictures)) + "\n" == written


@pytest.mark.skipif(not COMMITTED.is_dir(), reason="no results are there")
def test_the_report_says_when_a_difference_is_decided():
    found = json.loads((COMMITTED / report.RESULTS_FILE).read_text(encoding="utf-8"))
    found = deepcopy(found)
    measured = found["worlds"]["noise"]["best_of_n"]
    for low, high, is_bold in ((0.1, 0.3, True), (-0.1, 0.3, False)):
        measured["comparisons"]["moe"]["drop"] = {"value": 0.2, "interval": {"low": low, "high": high}}
        page = "\n".join(report.report_lines(found, {}))
        assert (f"**+0.20 [{low:+.2f}, {high:+.2f}]**" in page) == is_bold


def test_differences_of_seeds_are_paired():
    figures = {"moe": [0.5, 0.1], plan.DENSE: [0.2, 0.3], "ensemble_mean": [0.4]}
    models = {name: {"seeds": [{"figures": {"drop": drop}} for drop in drops]} for name, drops in figures.items()}
    assert report.seed_differences({"models": models}, "moe", "drop") == pytest.approx([0.3, -0.2])
    assert report.seed_differences({"models": models}, "ensemble_mean", "drop") == []


@pytest.mark.parametrize(("loses", "words"), [(True, "in 1 of 2 worlds: B."), (False, "nothing to reduce")])
def test_the_report_says_first_whether_anything_could_be_reduced(loses, words):
    worlds = {
        title: {"title": title, "best_of_n": {"baseline_overoptimizes": over}}
        for title, over in (("A", False), ("B", loses))
    }
    assert words in report.summary(worlds)


TRAINING = {"per_device_train_batch_size": 4, "max_steps": 2, "max_length": 64}


@pytest.fixture
def tiny(content) -> dict:
    """A study of a few steps."""
    return {
        **content,
        "text": {"sources": ["people"], "max_prompt_characters": 90, "max_answer_characters": 90, "vocab_size": 300},
        "model": {**content["model"], "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
        "policy_training": {"block_size": 32, "per_device_train_batch_size": 2, "max_steps": 2, "max_eval_blocks": 1},
        "gold_training": TRAINING,
        "samples": {
            "gold_prompts": 4,
            "responses_per_gold_prompt": 2,
            "training_prompts": 8,
            "responses_per_training_prompt": 4,
            "merge_prompts": 3,
            "test_prompts": 3,
            "responses": 4,
            "temperature": 1.0,
            "max_new_tokens": 8,
        },
        "training": TRAINING,
        "worlds": {"bias": {"title": "Bias", "shortcut": "a", "shortcut_rate": 1.0}},
        "learned_merge": {"max_steps": 2, "max_length": 64},
        "scoring": {"batch_size": 4, "max_length": 64},
        "seeds": [1, 2],
    }


@pytest.mark.slow
def test_a_whole_study_runs_and_goes_on_where_it_was(tiny, tmp_path, people, monkeypatch, capsys):
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, "")  # set by the run, and put back afterwards
    config = tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump(tiny), encoding="utf-8")
    run = [str(config), "--data", str(people), "--output", str(tmp_path / "out")]
    assert command.main(run) == 0
    page = (tmp_path / "out" / "report" / report.REPORT_FILE).read_text(encoding="utf-8")
    for title in report.TITLES.values():
        assert f"| {title} |" in page
    found = json.loads((tmp_path / "out" / "report" / report.RESULTS_FILE).read_text(encoding="utf-8"))
    assert set(found["worlds"]["bias"]["best_of_n"]["models"]) == set(plan.METHODS)
    capsys.readouterr()
    assert command.main(run) == 0
    assert "22 of 22 results are there already." in capsys.readouterr().out
