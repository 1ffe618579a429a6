"""A study's file: what is misspelt, missing or impossible is one line, before anything runs."""

from pathlib import Path

import pytest
from study_settings import load_study

from upcycled_moe.common.settings import SettingsError


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
        load_study(write_config({**settings, **change}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_setting_is_named(settings, write_config):
    del settings["baseline"]
    with pytest.raises(SettingsError, match=r"study\.yaml: baseline is missing"):
        load_study(write_config(settings))


@pytest.mark.parametrize("path", sorted(STUDY.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_studies_are_valid(path):
    study = load_study(path)
    assert study.baseline in study.methods


def test_a_methods_settings_win_over_its_recipe_and_that_over_the_shared_ones(settings, write_config):
    settings["recipe"] |= {"num_experts": 16, "router": "mlp", "calibration_tokens": 64}
    study = load_study(write_config(settings))
    recipe = study.recipe_of(study.methods["vanilla"], calibration_data=["text"])
    assert (recipe.num_experts, recipe.router, recipe.calibration_tokens) == (4, "linear", 64)
    # The recipe's own model and text are those of the paper.
    folded = study.recipe_of(study.methods["folded"], calibration_data=["text"])
    assert (folded.model, folded.calibration_data, folded.key_statistic) == (None, ["text"], "attended")
