from pathlib import Path

import pytest

from upcycled_moe.common.checkpoint_names import NamedCheckpoint
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.overoptimization.settings import (
    Ensemble,
    OveroptimizationSettings,
    PolicySettings,
    RewardModel,
    parse_ensemble,
    parse_reward_models,
)


def named(name, *paths):
    return RewardModel(name, tuple(NamedCheckpoint(name, path) for path in paths))


TABLE = Path("samples.parquet")
GOLD = NamedCheckpoint("gold", "org/gold")
POLICY = PolicySettings(NamedCheckpoint("policy", "org/policy"), ["pairs.parquet"])


@pytest.mark.parametrize(
    "arguments", [["dense=org/a,org/b", "moe=org/c"], ["dense=org/a", "dense=org/b", "moe=org/c"]]
)
def test_seeds_come_with_commas_or_by_repeating_the_name(arguments):
    assert parse_reward_models(arguments) == [named("dense", "org/a", "org/b"), named("moe", "org/c")]


def test_a_checkpoint_without_a_name_is_called_by_its_path():
    assert parse_reward_models(["org/a", "x=org/b@main"]) == [
        named("a", "org/a"),
        RewardModel("x", (NamedCheckpoint("x", "org/b", "main"),)),
    ]


def test_a_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "a=b,c"
    folder.mkdir()
    assert parse_reward_models([str(folder)]) == [named("a=b,c", str(folder))]
    assert parse_reward_models([f"x={folder}"]) == [named("x", str(folder))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dense=org/a,org/a"], "dense: org/a is given twice; give each seed once."),
        (["org/a", "a=org/b"], "two checkpoints would be called 'a'"),
        (["dense="], "'dense=': give a checkpoint as PATH or NAME=PATH."),
    ],
)
def test_reward_models_that_cannot_be(arguments, message):
    with pytest.raises(SettingsError, match=message):
        parse_reward_models(arguments)


def test_an_ensemble():
    assert parse_ensemble("worst = min: one, two") == Ensemble("worst", "min", ("one", "two"))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("worst", "give an ensemble as NAME=METHOD:MODEL,MODEL"),
        ("worst=min", "give an ensemble as NAME=METHOD:MODEL,MODEL"),
        ("worst=min:", "give an ensemble as NAME=METHOD:MODEL,MODEL"),
        ("=min:one,two", "give an ensemble as NAME=METHOD:MODEL,MODEL"),
        ("worst=median:one,two", "unknown method 'median'; choose one of mean, min"),
    ],
)
def test_an_ensemble_that_cannot_be(argument, message):
    with pytest.raises(SettingsError, match=message):
        parse_ensemble(argument)


def test_the_first_model_is_the_baseline_unless_another_is_named():
    models, ensembles = [named("a", "org/a", "org/b"), named("b", "org/c")], [Ensemble("both", "mean", ("a", "b"))]
    settings = OveroptimizationSettings(TABLE, models, gold=GOLD, ensembles=ensembles)
    assert (settings.names, settings.baseline_name) == (["a", "b", "both"], "a")
    assert OveroptimizationSettings(TABLE, models, gold=GOLD, baseline="b").baseline_name == "b"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_models": []}, "No reward models are given"),
        ({"gold": None}, "Give gold once"),
        ({"gold_column": "human"}, "Give gold once"),
        ({"samples": POLICY, "gold": None, "gold_column": "human"}, "have no column of gold scores"),
        ({"baseline": "c"}, "baseline='c' is no model; there are a, b."),
        ({"ensembles": [Ensemble("a", "min", ("a", "b"))]}, "Two models are called 'a'"),
        ({"ensembles": [Ensemble("x", "min", ("a", "c"))]}, "Ensemble x: 'c' is no reward model; there are a, b."),
        ({"ensembles": [Ensemble("x", "min", ("a",))]}, "Ensemble x: has one member only"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"num_resamples": 99}, "num_resamples=99 must be at least 100"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"dtype": "int8"}, "dtype='int8': choose one of auto"),
    ],
)
def test_settings_that_do_not_fit_together(changes, message):
    models = [named("a", "org/a"), named("b", "org/b")]
    with pytest.raises(SettingsError, match=message):
        OveroptimizationSettings(**{"samples": TABLE, "reward_models": models, "gold": GOLD, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "A policy needs prompts"),
        ({"num_samples": 1}, "num_samples=1 must be at least 2"),
        ({"max_prompts": 1}, "max_prompts=1 must be at least 2"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above zero"),
        ({"temperature": float("nan")}, "temperature=nan must be above zero"),
        ({"temperature": float("inf")}, "temperature=inf must be finite"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_a_policy_that_cannot_be(changes, message):
    with pytest.raises(SettingsError, match=message):
        PolicySettings(**{"policy": GOLD, "prompts": ["pairs.parquet"], **changes})
