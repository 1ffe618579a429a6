import dataclasses
import json
import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from fresh_models import Warnings
from transformers import Qwen2ForSequenceClassification

from upcycled_moe.common.checkpoint_names import NamedCheckpoint
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.overoptimization import overoptimize, scoring
from upcycled_moe.overoptimization.overoptimize import PICTURE_FILE, RESULTS_FILE, measure_overoptimization
from upcycled_moe.overoptimization.samples import read_samples
from upcycled_moe.overoptimization.score_table import TABLE_FILE
from upcycled_moe.overoptimization.settings import Ensemble, OveroptimizationSettings, PolicySettings, RewardModel
from upcycled_moe.preference.scoring import load_reward_model, score_conversations


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Drawing has tests of its own; collecting garbage takes longer than these models do."""
    monkeypatch.setattr(overoptimize, "write_plot", lambda results, path: path.touch())
    monkeypatch.setattr(scoring, "free_memory", lambda: None)


@pytest.fixture(scope="module")
def samples_file(tmp_path_factory):
    words = ("of", "the", "and", "that was", "have", "it is for")
    rows = [
        {"prompt": f"ask {number}", "responses": [f"{word} {number}" for word in words], "human": [1, 2, 3, 4, 5, 6]}
        for number in range(4)
    ]
    path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def scored(monkeypatch):
    """The checkpoints that are loaded to score, in their order."""
    names = []

    def load(name, **options):
        names.append(name)
        return load_reward_model(name, **options)

    monkeypatch.setattr(scoring, "load_reward_model", load)
    return names


@pytest.fixture
def settings(samples_file, reward_model):
    """`settings(**changes)`: two seeds of one model, another, and an ensemble of the two, with a gold model."""

    def make(**changes):
        a, b, c, gold = (NamedCheckpoint("a", str(reward_model(seed))) for seed in range(4))
        models = [RewardModel("a", (a, b)), RewardModel("c", (c,))]
        given = {"gold": gold, "ensembles": [Ensemble("worst", "min", ("a",))], "num_resamples": 100}
        return OveroptimizationSettings(**{"samples": samples_file, "reward_models": models, **given, **changes})

    return make


def paths(settings):
    return [checkpoint.path for model in settings.reward_models for checkpoint in model.checkpoints]


def test_everything_is_written(settings, samples_file, tmp_path):
    given = settings()
    measurement = measure_overoptimization(given, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {TABLE_FILE, RESULTS_FILE, PICTURE_FILE}
    content = json.loads((tmp_path / "out" / RESULTS_FILE).read_text())
    assert content == json.loads(json.dumps(measurement.to_dict()))
    assert list(content["models"]) == ["a", "c", "worst"]
    assert content["samples"]["sha256"] == read_samples(samples_file).sha256
    assert (content["samples"]["num_prompts"], content["samples"]["num_responses"]) == (4, 6)
    assert content["numbers"] == [1, 2, 3, 4, 6]
    assert [len(model["seeds"]) for model in content["models"].values()] == [2, 1, 1]
    assert [one["path"] for one in content["models"]["a"]["checkpoints"]] == paths(given)[:2]
    assert content["models"]["worst"]["members"] == ["a"]


def test_the_scores_are_those_of_the_models(settings, samples_file, tmp_path):
    given = settings()
    content = measure_overoptimization(given, tmp_path / "out").to_dict()
    table = pq.read_table(tmp_path / "out" / TABLE_FILE)
    conversations = read_samples(samples_file).conversations()
    for source in (content["gold"], *content["models"]["a"]["checkpoints"]):
        expected = score_conversations(*load_reward_model(source["path"]), conversations)
        np.testing.assert_allclose(np.ravel(table.column(source["column"]).to_pylist()), expected, atol=1e-6)
    gold = np.array(table.column(content["gold"]["column"]).to_pylist())
    assert content["gold"]["mean"] == pytest.approx(gold.mean())
    centred = gold - gold.mean(axis=1, keepdims=True)
    assert content["gold"]["standard_deviation_within_prompts"] == pytest.approx(centred.std())
    assert content["oracle"]["values"][-1] == pytest.approx(centred.max(axis=1).mean() / centred.std())


def test_gold_may_be_a_column(settings, tmp_path, scored):
    given = settings(gold=None, gold_column="human")
    content = measure_overoptimization(given, tmp_path / "out").to_dict()
    assert (content["gold"]["column"], content["gold"]["mean"]) == ("human", 3.5)
    assert scored == paths(given)


@pytest.mark.parametrize(
    ("column", "message"),
    [("people", "gold_column='people': no column .*; there is 'human'"), ("prompt", "no column")],
)
def test_a_gold_column_that_is_not_there(settings, tmp_path, column, message):
    with pytest.raises(SettingsError, match=message):
        measure_overoptimization(settings(gold=None, gold_column=column), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seeds", [(0, 3), (0, 0)])
def test_gold_is_no_proxy_and_no_seed_comes_twice(settings, tmp_path, scored, reward_model, seeds):
    """A folder elsewhere with the same content is the same checkpoint."""
    first, second = (reward_model(seed) for seed in seeds)
    copied = shutil.copytree(second, tmp_path / "copied")
    models = [RewardModel("a", tuple(NamedCheckpoint("a", str(folder)) for folder in (first, copied)))]
    message = f"a: {copied} is " + ("gold itself" if seeds[1] == 3 else f"the same checkpoint as {first}")
    with pytest.raises(SettingsError, match=re.escape(message)):
        measure_overoptimization(settings(reward_models=models), tmp_path / "out")
    assert scored == []
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_stopped_goes_on(settings, tmp_path, scored, monkeypatch):
    given = settings()
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score_conversations", stopping_at(2))
        with pytest.raises(KeyboardInterrupt):
            measure_overoptimization(given, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {TABLE_FILE}
    stopped_at = list(scored)
    assert stopped_at == [given.gold.path, *paths(given)[:2]]
    resumed = measure_overoptimization(given, tmp_path / "out")
    assert scored[3:] == paths(given)[1:]
    assert resumed.to_dict() == measure_overoptimization(given, tmp_path / "whole").to_dict()


def stopping_at(number):
    calls = []

    def score(*arguments, **options):
        calls.append(arguments)
        if len(calls) > number:
            raise KeyboardInterrupt
        return score_conversations(*arguments, **options)

    return score


def test_a_model_more_is_scored_alone(settings, tmp_path, scored, reward_model):
    given = settings()
    first = measure_overoptimization(given, tmp_path / "out").to_dict()
    scored.clear()
    more = [*given.reward_models, RewardModel("d", (NamedCheckpoint("d", str(reward_model(4))),))]
    with pytest.raises(SettingsError, match=r"exists and is not empty; .*--overwrite"):
        measure_overoptimization(settings(reward_models=more), tmp_path / "out")
    second = measure_overoptimization(settings(reward_models=more), tmp_path / "out", overwrite=True).to_dict()
    assert scored == [str(reward_model(4))]
    assert {name: second["models"][name] for name in first["models"]} == first["models"]


def test_a_table_of_another_run_brings_its_scores(settings, tmp_path, scored):
    first = measure_overoptimization(settings(), tmp_path / "out").to_dict()
    scored.clear()
    again = measure_overoptimization(settings(samples=tmp_path / "out" / TABLE_FILE), tmp_path / "again").to_dict()
    assert scored == []
    assert again["models"] == first["models"]


def test_a_change_of_the_checkpoint_or_the_length_scores_anew(settings, tmp_path, scored, write_model):
    folder = write_model(Qwen2ForSequenceClassification, 5, num_labels=1)
    models = [RewardModel("a", (NamedCheckpoint("a", str(folder)),))]
    given = settings(reward_models=models, ensembles=())
    measure_overoptimization(given, tmp_path / "out")
    scored.clear()
    weights = folder / "model.safetensors"
    weights.write_bytes((write_model(Qwen2ForSequenceClassification, 6, num_labels=1) / weights.name).read_bytes())
    measure_overoptimization(given, tmp_path / "out", overwrite=True)
    assert scored == [str(folder)]
    measure_overoptimization(
        settings(reward_models=models, ensembles=(), max_length=64), tmp_path / "out", overwrite=True
    )
    assert scored[1:] == [given.gold.path, str(folder)]


def test_other_samples_leave_no_results_of_the_earlier_ones(settings, samples_file, tmp_path, monkeypatch):
    measure_overoptimization(settings(), tmp_path / "out")
    other = tmp_path / "other.jsonl"
    other.write_text(samples_file.read_text().replace("have", "had"), encoding="utf-8")
    monkeypatch.setattr(scoring, "score_conversations", stopping_at(0))
    with pytest.raises(KeyboardInterrupt):
        measure_overoptimization(settings(samples=other), tmp_path / "out", overwrite=True)
    # What was scored before is not given up without leave either.
    with pytest.raises(SettingsError, match="holds scores of other samples; give another folder, or --overwrite"):
        measure_overoptimization(settings(), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {TABLE_FILE}
    assert read_samples(tmp_path / "out" / TABLE_FILE).sha256 == read_samples(other).sha256


def test_a_policy_draws_once(settings, policy, tmp_path, scored, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"ask {number}"}) for number in range(3)), encoding="utf-8")
    drawing = PolicySettings(NamedCheckpoint("policy", str(policy)), [str(prompts)], num_samples=4, max_new_tokens=3)
    first = measure_overoptimization(settings(samples=drawing), tmp_path / "out").to_dict()
    assert first["samples"]["origin"]["num_samples"] == 4
    monkeypatch.setattr(overoptimize, "generate_samples", None)
    # As a run leaves it that is stopped at its end.
    (tmp_path / "out" / RESULTS_FILE).unlink()
    with pytest.raises(SettingsError, match="holds scores of other samples"):
        measure_overoptimization(settings(samples=dataclasses.replace(drawing, temperature=0.5)), tmp_path / "out")
    again = measure_overoptimization(settings(samples=drawing), tmp_path / "out").to_dict()
    assert again == first
    assert len(scored) == 4


def test_what_is_no_reward_model_is_refused_before_any_is_scored(settings, policy, tmp_path, scored):
    models = [*settings().reward_models, RewardModel("lm", (NamedCheckpoint("lm", str(policy)),))]
    with pytest.raises(SettingsError, match="a reward model is a …ForSequenceClassification"):
        measure_overoptimization(settings(reward_models=models), tmp_path / "out")
    assert scored == []
    assert not (tmp_path / "out").exists()


def test_scores_that_are_no_numbers_are_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "score_conversations", lambda *_, **__: [0.0] * 7 + [float("nan")] + [0.0] * 16)
    with pytest.raises(SettingsError, match=r"the score of prompt 1, response 1 is nan"):
        measure_overoptimization(settings(), tmp_path / "out")


def test_gold_that_tells_nothing_apart_is_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "score_conversations", lambda *_, **__: [0.5] * 24)
    with pytest.raises(SettingsError, match=r"gold scores all responses to a prompt the same; give one that tells"):
        measure_overoptimization(settings(), tmp_path / "out")


def test_gold_that_tells_only_prompts_apart_is_refused(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "score_conversations", lambda *_, **__: np.repeat(range(4), 6).tolist())
    with pytest.raises(SettingsError, match="gold scores all responses to a prompt the same"):
        measure_overoptimization(settings(), tmp_path / "out")


@pytest.mark.parametrize("num_alike", [1, 4])
def test_responses_that_are_all_alike_leave_no_choice(settings, samples_file, tmp_path, num_alike):
    rows = [json.loads(line) for line in samples_file.read_text().splitlines()]
    for row in rows[:num_alike]:
        row["responses"] = ["the same"] * 6
    path = tmp_path / "alike.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = settings(samples=path, gold=None, gold_column="human")
    if num_alike == 4:
        with pytest.raises(SettingsError, match="are all the same, so that there is nothing to choose"):
            measure_overoptimization(given, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    else:
        progress = Warnings()
        measure_overoptimization(given, tmp_path / "out", progress=progress)
        assert "the responses to 1 of 4 prompts are all the same" in progress.messages[0]


def test_a_folder_of_others_is_not_replaced(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(SettingsError, match="holds no measurement"):
        measure_overoptimization(settings(), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_an_evaluation_is_not_replaced(settings, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RESULTS_FILE).write_text("{}")
    with pytest.raises(SettingsError, match="holds no measurement"):
        measure_overoptimization(settings(), tmp_path / "out", overwrite=True)


def test_without_matplotlib_there_is_no_picture(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(overoptimize, "can_draw", lambda: False)
    progress = Warnings()
    measure_overoptimization(settings(), tmp_path / "out", progress=progress)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {TABLE_FILE, RESULTS_FILE}
    assert "Matplotlib is not installed" in progress.messages[-1]
