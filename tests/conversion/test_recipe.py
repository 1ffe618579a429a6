import dataclasses

import pytest

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.conversion.recipe import ROUTERS_WITHOUT_PARAMETERS, ConversionRecipe, build_recipe
from upcycled_moe.conversion.routers import ROUTER_INITIALIZERS


def test_later_layers_win():
    recipe = build_recipe(("file", {"num_experts": 16, "seed": 3}), ("command line", {"seed": 7, "router": "linear"}))
    assert (recipe.num_experts, recipe.seed, recipe.router) == (16, 7, "linear")
    assert recipe.num_experts_per_tok == ConversionRecipe().num_experts_per_tok


MIXTURE = {
    "router": "mixture",
    "num_routers": 8,
    "key_statistic": "mean",
    "calibration_data": ["a.txt"],
    "calibration_tokens": 4096,
}


@pytest.mark.parametrize(
    ("file", "flags", "dropped"),
    [
        (MIXTURE, {"router": "linear"}, {"num_routers", "key_statistic"}),
        (MIXTURE, {"router": "linear", "backbone": "random"}, set(MIXTURE) - {"router"}),
        (MIXTURE, {"router": "linear", "calibration_data": []}, set(MIXTURE) - {"router", "calibration_data"}),
        ({"experts": "noise", "expert_noise": 0.1}, {"experts": "copy"}, {"expert_noise"}),
        (
            {"router_selection": "grouped_top_k", "num_expert_groups": 4},
            {"router_selection": "top_k"},
            {"num_expert_groups"},
        ),
        ({"router_selection": "top_p", "router_top_p": 0.4}, {"router_selection": "expert_choice"}, {"router_top_p"}),
        (
            {"router_selection": "grouped_top_k", "num_expert_groups": 4},
            {"router_selection": "prototype_top_k"},
            set(),
        ),
        (
            {"use_router_bias": True, "router_bias_update_rate": 0.01},
            {"use_router_bias": False},
            {"router_bias_update_rate"},
        ),
        ({"model": "a/b", "revision": "v1"}, {"model": "c/d"}, {"revision"}),
        ({"model": "a/b", "revision": "v1"}, {"model": "a/b"}, set()),
        (
            {"mlp_only_layers": [0], "decoder_sparse_step": 2},
            {"moe_layers": [1]},
            {"mlp_only_layers", "decoder_sparse_step"},
        ),
    ],
)
def test_what_a_flag_takes_the_meaning_from_goes_with_it(file, flags, dropped):
    kept = {name: value for name, value in file.items() if name not in dropped}
    assert build_recipe(("file", file), ("command line", flags)) == build_recipe(("both", kept | flags))
    # In one layer they contradict each other; a model has its revision there.
    if dropped and "revision" not in dropped:
        with pytest.raises(SettingsError):
            build_recipe(("file", file | flags))


def test_a_list_of_layers_is_not_thinned_out_by_a_flag():
    with pytest.raises(SettingsError, match="moe_layers says it all"):
        build_recipe(("file", {"moe_layers": [1, 3]}), ("command line", {"mlp_only_layers": [3]}))


def test_a_flag_hides_no_error_of_the_file():
    wrong = {"router": "linear", "num_routers": 4}
    for flags in ({"seed": 1}, {"router": "mlp"}):
        with pytest.raises(SettingsError, match="num_routers has no meaning with router="):
            build_recipe(("file", wrong), ("command line", flags))
    with pytest.raises(SettingsError, match="num_routers has no meaning with router='linear'"):
        build_recipe(("file", {"router": "mixture"}), ("command line", wrong))


def test_what_settings_know_of_routers_is_what_routers_are():
    for name, initializer in ROUTER_INITIALIZERS.items():
        assert (initializer.scaled_tensor is None) == (name in ROUTERS_WITHOUT_PARAMETERS)


def test_the_settings_make_the_same_recipe_again():
    recipe = ConversionRecipe(num_experts=16, mlp_only_layers=[0, 1], router_logit_std=1, calibration_data=["a.txt"])
    assert build_recipe(("file", recipe.to_dict())) == recipe


def test_every_setting_has_a_help_text():
    for setting in dataclasses.fields(ConversionRecipe):
        assert setting.metadata["help"], setting.name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_expert": 4}, "file: unknown key 'num_expert'; did you mean 'num_experts'?"),
        ({"num_experts": "8"}, "num_experts='8': expected int."),
        ({"num_experts": True}, "num_experts=True: expected int."),
        ({"num_experts": 8.0}, "num_experts=8.0: expected int."),
        ({"num_experts": None}, "num_experts=None: expected int."),
        ({"num_routers": 2.5}, "num_routers=2.5: expected int or null."),
        ({"router": "mixtures"}, "router='mixtures': expected 'linear' or 'mixture' or 'mlp' or"),
        ({"router": ["linear"]}, "router=['linear']: expected 'linear' or 'mixture' or"),
        ({"calibration_data": "a.txt"}, "calibration_data='a.txt': expected a list of str."),
        ({"mlp_only_layers": ["0"]}, "mlp_only_layers=['0']: expected a list of int."),
        ({"router_logit_std": "1"}, "router_logit_std='1': expected float or 'auto' or 'none'."),
        ({"max_shard_size": 5}, "max_shard_size=5: expected str."),
        ({"num_experts": 0}, "num_experts=0 is outside 2 to 256."),
        ({"num_routers": 0}, "num_routers=0 must be at least 1."),
        ({"heads_per_router": -1}, "heads_per_router=-1 must be at least 1."),
        ({"calibration_tokens": 0, "calibration_data": ["a"]}, "calibration_tokens=0 must be at least 1."),
        (
            {"calibration_tokens": 10, "calibration_data": ["a"]},
            "calibration_tokens=10 is less than one sequence of calibration_block_size=1024",
        ),
        ({"num_zero_experts": -8}, "num_zero_experts=-8 is outside 0 to 256."),
        ({"num_copy_experts": 10**12}, "num_copy_experts=1000000000000 is outside 0 to 256."),
        ({"num_constant_experts": 257}, "num_constant_experts=257 is outside 0 to 256."),
        (
            {"backbone": "random", "calibration_data": ["a"]},
            "calibration_data has no meaning with backbone='random', only with backbone='auto' or backbone='copy' or",
        ),
        ({"expert_sources": ["a", "b", "a"]}, "expert_sources: a is named twice, or is the model itself"),
        ({"model": "org/m", "expert_sources": ["org/m"]}, "expert_sources: org/m is named twice, or is the model"),
        ({"router": "linear", "num_routers": 4}, "num_routers has no meaning with router='linear'"),
        ({"router": "linear", "heads_per_router": 4}, "heads_per_router has no meaning with router='linear'"),
        ({"router": "linear", "router_pooling": "max"}, "router_pooling has no meaning with router='linear'"),
        ({"router": "linear", "key_statistic": "mean"}, "key_statistic has no meaning with router='linear'"),
        (
            {"calibration_tokens": 2048},
            "calibration_tokens has no meaning without calibration_data; give both",
        ),
        ({"calibration_split": "test"}, "calibration_split has no meaning without calibration_data"),
        ({"router_logit_std": 1.0}, "router_logit_std is measured on text; give calibration_data."),
        ({"router_logit_std": 0, "calibration_data": ["a"]}, "router_logit_std=0 must be above zero and finite."),
        ({"router_logit_std": float("nan"), "calibration_data": ["a"]}, "must be above zero and finite."),
        ({"router_logit_std": float("inf"), "calibration_data": ["a"]}, "must be above zero and finite."),
        (
            {"router": "grouped_average", "router_logit_std": 1.0, "calibration_data": ["a"]},
            "router_logit_std has no meaning with router='grouped_average', which has no parameters.",
        ),
        (
            {"router": "grouped_average", "experts": "split"},
            "router='grouped_average' cannot score all slices of a copy alike, as experts='split' needs; use another",
        ),
        ({"router": "mlp", "head_grouping": "random"}, "head_grouping has no meaning with router='mlp'"),
        (
            {"router": "domain"},
            "router='domain' needs at least two domains, each an entry of calibration_data; it has 0.",
        ),
        ({"router": "domain", "calibration_data": ["a"]}, "needs at least two domains"),
        (
            {"router": "domain", "calibration_data": ["a", "b", "a", "c"]},
            "calibration_data names 'a' twice; with router='domain' each is a domain.",
        ),
        (
            {"router": "domain", "calibration_data": ["a", "b", "c"]},
            "num_experts=8 is not a multiple of the 3 domains in calibration_data: every domain has the same number",
        ),
        (
            {
                "router": "domain",
                "calibration_data": ["a", "b", "c", "d"],
                "experts": "split",
                "expert_granularity": 4,
            },
            "num_experts=8 / expert_granularity=4 is not a multiple of the 4 domains in calibration_data",
        ),
        (
            {"router": "domain", "calibration_data": ["a", "b"], "expert_sources": ["x", "y", "z"]},
            "calibration_data has 2 domains for 4 dense checkpoints, the model and its expert_sources; give one for",
        ),
        (
            {"router": "domain", "calibration_data": ["a", "b"], "calibration_tokens": 1024},
            "calibration_tokens=1024 is less than one sequence of calibration_block_size=1024 for each of 2 domains",
        ),
    ],
)
def test_what_makes_no_recipe_is_refused(settings, message):
    with pytest.raises(SettingsError) as error:
        build_recipe(("file", settings))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "copies", "distinct"),
    [
        ({"num_experts": 8}, 8, 8),
        ({"num_experts": 8, "experts": "split"}, 4, 4),
        ({"num_experts": 8, "experts": "split", "expert_granularity": 8}, 1, 1),
        ({"num_experts": 8, "num_zero_experts": 1, "num_copy_experts": 2, "num_constant_experts": 3}, 8, 14),
        ({"num_experts": 8, "experts": "split", "num_copy_experts": 2}, 4, 6),
    ],
)
def test_experts_that_are_told_apart(settings, copies, distinct):
    recipe = ConversionRecipe(**settings)
    assert (recipe.num_ffn_copies, recipe.num_distinct_experts) == (copies, distinct)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        ("12B", 12),
        ("500MB", 500 * 10**6),
        ("5GB", 5 * 10**9),
        ("1.5 gb", 15 * 10**8),
        ("2KiB", 2048),
        ("1TiB", 2**40),
    ],
)
def test_shard_sizes(text, num_bytes):
    assert ConversionRecipe(max_shard_size=text).max_shard_bytes == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "five", "5XB", "5GBB", "0MB", "-1GB", "infGB", "nanGB", "1e999"])
def test_what_is_no_shard_size_is_refused(text):
    with pytest.raises(SettingsError, match=r"^max_shard_size="):
        ConversionRecipe(max_shard_size=text)


@pytest.mark.parametrize(
    ("router", "setting", "target"),
    [("mixture", "auto", 1.0), ("linear", "auto", None), ("mixture", "none", None), ("linear", 2, 2.0)],
)
def test_logits_of_a_mixture_are_scaled_unless_told_not_to(router, setting, target):
    recipe = ConversionRecipe(router=router, router_logit_std=setting, calibration_data=["a.txt"])
    assert recipe.target_logit_std == target
