"""A study's file: what is misspelt, missing or impossible is one line, before anything runs."""

import dataclasses
from pathlib import Path

import pytest
from checks import check_models_and_training
from study_settings import load_study

from upcycled_moe.common.settings import SettingsError


TEXT = dict.fromkeys(("passage_characters", "parent_characters", "upcycling_characters"), 100)
TEXT |= {"validation_characters": 100, "vocab_size": 320}
STUDY = Path(__file__).parents[2] / "studies" / "router_upcycling"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seds": [1]}, "unknown key 'seds'; did you mean 'seeds'"),
        ({"seeds": None}, "seeds=None has the wrong type"),
        ({"seeds": []}, "0 seeds are outside 1 to 21"),
        ({"seeds": [1, 1]}, "each once"),
        ({"seeds": [True]}, "whole numbers"),
        ({"baseline": "vanila"}, "did you mean 'vanilla'"),
        ({"text": {"domains": []}}, "text: passage_characters is missing"),
        ({"text": 5}, "text=5 has the wrong type"),
        ({"training": {"seed": 3}}, "training.seed is set by the study itself"),
        (
            {"methods": {"vanilla": {"title": "V", "parents": ["gqa"], "training": {"max_steps": 9}}}},
            "methods.vanilla.training.max_steps must be the same for all methods",
        ),
        ({"analysis": {"block_sise": 8}}, "analysis: unknown key 'block_sise'; did you mean 'block_size'"),
        ({"analysis": {"block_size": 0}}, "analysis: block_size=0 must be at least 1"),
        (
            {"text": TEXT | {"domains": ["fiction", "fiction"]}},
            "text.domains: fiction, fiction: each may be there once",
        ),
        ({"text": TEXT | {"domains": [1]}}, "text.domains: 1 is no name"),
        ({"text": TEXT | {"domains": ["all"]}}, "'all' is what results call all of them"),
        ({"parents": {}}, "parents is empty"),
        ({"methods": {"../evil": {"title": "V", "parents": ["gqa"]}}}, "methods: '../evil' is no name"),
        ({"methods": {"vanilla": {"title": "V", "parents": []}}}, "methods.vanilla.parents is empty"),
        ({"comparisons": [["vanilla", "vanilla"]]}, "['vanilla', 'vanilla'] compares nothing"),
        ({"comparisons": [["vanilla", 1]]}, "['vanilla', 1] is not a pair of methods"),
        (
            {
                "parents": {"gqa": {}, "mha": {}},
                "methods": {
                    "vanilla": {"title": "V", "parents": ["gqa", "mha"]},
                    "first": {"title": "F", "parents": ["gqa"]},
                    "second": {"title": "S", "parents": ["mha"]},
                },
                "primary_comparisons": [["first", "second"]],
            },
            "primary_comparisons: ['first', 'second'] compares nothing",
        ),
        ({"comparisons": [["vanilla"]]}, "['vanilla'] is not a pair of methods"),
        ({"comparisons": [["vanilla", "fold"]]}, "comparisons: unknown key 'fold'; did you mean 'folded'"),
        ({"parents": {"gqa": {}, "mha": {}}}, "parent 'mha' is without the baseline"),
        ({"methods": {"vanilla": {"title": "V", "parents": ["mha"]}}}, "methods.vanilla.parents: unknown key 'mha'"),
        ({"methods": {"vanilla": {"title": "V", "parents": ["gqa"], "recipe": "vanilla"}}}, "unknown key 'vanilla'"),
        (
            {"methods": {"vanilla": {"title": "V", "parents": ["gqa"], "fold_routers": True}}},
            "need a recipe",
        ),
        (
            {
                "methods": {
                    "vanilla": {
                        "title": "V",
                        "parents": ["gqa"],
                        "recipe": "vanilla_upcycling_8x0.5b",
                        "settings": {"num_expert": 4},
                    }
                }
            },
            "did you mean 'num_experts'",
        ),
    ],
)
def test_wrong_settings_are_named(settings, write_config, change, message):
    with pytest.raises(SettingsError) as error:
        load_study(write_config({**settings, "primary_comparisons": [], "comparisons": [], **change}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_setting_is_named(settings, write_config):
    del settings["baseline"]
    with pytest.raises(SettingsError, match=r"study\.yaml: baseline is missing"):
        load_study(write_config(settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"hidden_sise": 8}}, "model: unknown key 'hidden_sise'; did you mean 'hidden_size'"),
        ({"parents": {"gqa": {"kv_heads": 2}}}, "parents.gqa: unknown key 'kv_heads'"),
        (
            {"training": {"max_steps": 4, "learning_rat": 1e-3}},
            "training: unknown key 'learning_rat'; did you mean 'learning_rate'",
        ),
        ({"parent_training": {}}, "parent_training: max_steps is missing"),
        ({"parents": {"gqa": {"hidden_size": -1}}}, "parents.gqa: hidden_size=-1 must be a whole number"),
        ({"parents": {"gqa": {"num_hidden_layers": True}}}, "parents.gqa: .*num_hidden_layers"),
        ({"parents": {"gqa": {"num_key_value_heads": 3}}}, "parents.gqa: num_attention_heads=8 must be a multiple"),
        ({"parents": {"gqa": {"hidden_size": 36}}}, "parents.gqa: hidden_size=36 must be a multiple"),
        (
            {"parents": {"gqa": {"num_key_value_heads": 2, "max_position_embeddings": 16}}},
            "calibration_block_size=32 exceeds",
        ),
    ],
)
def test_what_libraries_read_is_checked_before_anything_runs(settings, write_config, change, message):
    with pytest.raises(SettingsError, match=message):
        check_models_and_training(load_study(write_config({**settings, **change})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"num_experts": 4, "num_routers": 64}}, "methods.folded, parent 'gqa': num_routers=64"),
        ({"recipe": "vanilla_upcycling_8x0.5b", "settings": {}}, "its routers are linear already"),
        ({"settings": {"num_experts": 4, "num_routers": 4, "router_pooling": "max"}}, "fold_routers: "),
    ],
)
def test_recipes_are_checked_against_parents_that_are_not_there_yet(settings, write_config, change, message):
    settings["methods"]["folded"] |= change
    with pytest.raises(SettingsError, match=message) as error:
        check_models_and_training(load_study(write_config(settings)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted(STUDY.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_studies_are_valid(path):
    study = load_study(path)
    assert study.baseline in study.methods
    # A machine without a GPU cannot check what is for one.
    on_cpu = {name: {**getattr(study, name), "use_cpu": True} for name in ("training", "parent_training")}
    check_models_and_training(dataclasses.replace(study, **on_cpu))


def test_a_methods_settings_win_over_its_recipe_and_that_over_the_shared_ones(settings, write_config):
    settings["recipe"] |= {"num_experts": 16, "router": "mlp", "calibration_tokens": 64}
    study = load_study(write_config(settings))
    recipe = study.recipe_of(study.methods["vanilla"], calibration_data=["text"])
    assert (recipe.num_experts, recipe.router, recipe.calibration_tokens) == (4, "linear", 64)
    # The recipe's own model and text are those of the paper.
    folded = study.recipe_of(study.methods["folded"], calibration_data=["text"])
    assert (folded.model, folded.calibration_data, folded.key_statistic) == (None, ["text"], "attended")
