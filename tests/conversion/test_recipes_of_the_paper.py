"""Each recipe of the package builds a plan on a model of the real shape, and the plan is that of its paper."""

import dataclasses

import pytest
from dense_checkpoints import byte_level_tokenizer
from test_plan import write_header_only
from transformers import Qwen2Config

from upcycled_moe.common.settings import load_yaml
from upcycled_moe.conversion.plan import build_plan, router_plans
from upcycled_moe.conversion.recipe import ConversionRecipe, build_recipe, packaged_recipes
from upcycled_moe.conversion.source import open_source


def shape(hidden, intermediate, heads, kv_heads, tied):
    return {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 24,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "Qwen/Qwen1.5-0.5B": shape(1024, 2816, 16, 16, False),
    "Qwen/Qwen1.5-1.8B": shape(2048, 5504, 16, 16, False),
    "Qwen/Qwen2.5-0.5B": shape(896, 4864, 14, 2, True),
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": shape(1024, 3072, 16, 8, True),
}
RECIPES = packaged_recipes()

# Table 3 and the ablations: routers R, their width D, keys K, and whether they fold into one linear router.
MIXTURES = {
    "routers_2_8x0.5b": (2, 512, 8, True),
    "routers_4_8x0.5b": (4, 256, 8, True),
    "router_upcycling_8x0.5b": (8, 128, 8, True),
    "routers_16_8x0.5b": (16, 64, 16, False),
    "routers_32_8x0.5b": (32, 32, 32, False),
    "max_pooling_8x0.5b": (8, 128, 8, False),
    "random_grouping_8x0.5b": (8, 128, 8, True),
    "one_head_8x0.5b": (8, 64, 8, True),
    "four_heads_8x0.5b": (8, 256, 8, True),
    "attended_keys_8x0.5b": (8, 128, 8, True),
    "scaled_logits_8x0.5b": (8, 128, 8, True),
    "router_upcycling_8x1.8b": (8, 256, 8, True),
    "router_upcycling_16x0.5b": (16, 64, 16, True),
}
# How well the others compute what their parent does, and whether their routers are or become linear ones.
OTHERS = {
    "moe_from_scratch_8x0.5b": ("none", True),
    "vanilla_upcycling_8x0.5b": ("exact", True),
    "switch_upcycling_8x0.5b": ("none", True),
    "locmoe_upcycling_8x0.5b": ("exact", True),
    "mlp_upcycling_8x0.5b": ("exact", False),
    "vanilla_upcycling_8x1.8b": ("exact", True),
    "vanilla_upcycling_16x0.5b": ("exact", True),
    "drop_upcycling": ("none", True),
    "fine_grained": ("exact", True),
    "deepseek_style": ("approximate", True),
    "grouped_experts": ("exact", True),
    "expert_choice": ("none", True),
    "dynamic_top_p": ("exact", True),
    "zero_computation": ("none", True),
    "xft": ("exact", True),
    "umm_rm": ("exact", True),
    "branch_train_mix": ("none", True),
    "domain_routers": ("none", True),
}


@pytest.fixture(scope="module")
def dense_of_real_shape(tmp_path_factory):
    """`dense_of_real_shape("Qwen/Qwen1.5-0.5B")`: folder of a checkpoint of that shape that takes no space.

    Another `number` gives another one.
    """
    folders = {}

    def folder(model, number=0):
        key = model, number
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("dense")
            write_header_only(folders[key], Qwen2Config(**SHAPES[model], architectures=["Qwen2ForCausalLM"]))
            byte_level_tokenizer().save_pretrained(folders[key])
        return folders[key]

    return folder


@pytest.fixture
def plan_of(dense_of_real_shape, tmp_path):
    """`plan_of("xft")`: the plan by that recipe, with local files in the place of what it names on the Hub."""

    def plan(name):
        recipe = build_recipe((name, load_yaml(RECIPES[name])))
        dense = str(dense_of_real_shape(recipe.model))
        texts = []
        for number in range(len(recipe.calibration_data)):
            texts.append(tmp_path / f"{number}.txt")
            texts[-1].write_text("text", encoding="utf-8")
        local = {"model": dense, "calibration_data": [str(text) for text in texts]}
        local["expert_sources"] = [
            str(dense_of_real_shape(recipe.model, number)) for number, _ in enumerate(recipe.expert_sources, start=1)
        ]
        return build_plan(open_source(dense), dataclasses.replace(recipe, **local))

    return plan


def test_every_recipe_is_here():
    assert sorted([*MIXTURES, *OTHERS]) == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_comments_are_short(name):
    lines = RECIPES[name].read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert all(len(line) < 120 for line in lines)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_have_the_papers_shapes(plan_of, name):
    plan = plan_of(name)
    num_routers, width, num_keys, folds = MIXTURES[name]
    config = plan.config
    assert (config.num_routers, config.router_head_dim, config.num_router_keys) == (num_routers, width, num_keys)
    assert {router.folds for router in router_plans(plan)} == {folds}
    assert plan.preserves_function == "exact"
    gate = {tensor.name.split(".mlp.")[1]: tensor.shape for tensor in plan.tensors if ".0.mlp.gate." in tensor.name}
    assert gate == {
        "gate.query_weight": (num_routers, width, config.hidden_size),
        "gate.keys": (num_keys, width),
    }


@pytest.mark.parametrize("name", OTHERS)
def test_the_others_preserve_and_fold_as_stated(plan_of, name):
    plan = plan_of(name)
    preserves_function, folds = OTHERS[name]
    assert plan.preserves_function == preserves_function
    assert {router.folds for router in router_plans(plan)} == {folds}


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("_8x0.5b")])
def test_models_of_the_tables_have_the_papers_size(plan_of, name):
    """About 2.1 billion parameters, 0.8 billion active; Switch sends a token to one expert."""
    plan = plan_of(name)
    assert plan.total_parameters == pytest.approx(2.1e9, rel=0.02)
    idle_expert = 24 * 3 * 1024 * 2816 * (plan.config.num_experts_per_tok == 1)
    assert plan.active_parameters + idle_expert == pytest.approx(0.85e9, rel=0.04)


def test_a_head_that_is_the_embedding_is_counted_apart(tmp_path):
    """So that the paper's figures are found whichever way the published model has it."""
    config = Qwen2Config(**SHAPES["Qwen/Qwen1.5-0.5B"] | {"tie_word_embeddings": True})
    config.architectures = ["Qwen2ForCausalLM"]
    write_header_only(tmp_path, config)
    plan = build_plan(open_source(str(tmp_path)), ConversionRecipe(router="linear"))
    assert plan.total_parameters == pytest.approx(1.92e9, rel=0.01)
    assert plan.total_parameters + plan.tied_head_parameters == pytest.approx(2.1e9, rel=0.02)
    assert plan.active_parameters + plan.tied_head_parameters == pytest.approx(0.85e9, rel=0.04)


@pytest.mark.parametrize(
    ("size", "total", "active"), [("8x1.8b", 7.6e9, 2.7e9), ("16x0.5b", 3.75e9, 0.85e9)], ids=["8x1.8b", "16x0.5b"]
)
@pytest.mark.parametrize("method", ["vanilla", "router"])
def test_larger_models_have_their_size(plan_of, method, size, total, active):
    plan = plan_of(f"{method}_upcycling_{size}")
    assert plan.total_parameters == pytest.approx(total, rel=0.03)
    assert plan.active_parameters == pytest.approx(active, rel=0.05)


def test_table_1_differs_in_the_router_only(plan_of):
    """So that its columns compare routers: neither experts nor the rest of the model differ in size."""
    names = [f"{method}_upcycling_8x0.5b" for method in ("vanilla", "switch", "locmoe", "mlp", "router")]
    plans = {name: plan_of(name) for name in names}
    without_routers = {
        name: plan.total_parameters - sum(router.parameters for router in router_plans(plan))
        for name, plan in plans.items()
    }
    assert len(set(without_routers.values())) == 1
    routers = {name: router_plans(plan)[0].parameters for name, plan in plans.items()}
    assert routers == {
        "vanilla_upcycling_8x0.5b": 8 * 1024,
        "switch_upcycling_8x0.5b": 8 * 1024,
        "locmoe_upcycling_8x0.5b": 0,
        "mlp_upcycling_8x0.5b": 1024 * 1024 + 8 * 1024,
        "router_upcycling_8x0.5b": 8 * 128 * 1024 + 8 * 128,
    }


@pytest.mark.parametrize("name", RECIPES)
def test_language_modeling_teaches_every_router(plan_of, name):
    assert not plan_of(name).config.has_constant_weights


def test_an_ablation_changes_one_thing():
    main = load_yaml(RECIPES["router_upcycling_8x0.5b"])
    for name in MIXTURES:
        if name.endswith("_8x0.5b") and name != "router_upcycling_8x0.5b":
            changed = {key for key, value in load_yaml(RECIPES[name]).items() if main.get(key) != value}
            # With as many heads, the number of routers settles how many each of them has.
            assert len(changed - ({"heads_per_router"} if "num_routers" in changed else set())) == 1, name
