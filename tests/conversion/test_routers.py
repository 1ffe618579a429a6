import typing
from itertools import combinations

import pytest
import torch
from dense_checkpoints import SHAPE

from modeling_upcycled_moe import ROUTERS, UpcycledQwenMoeConfig
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.conversion.calibration import LayerActivations
from upcycled_moe.conversion.randomness import tensor_generator
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.routers import (
    ROUTER_INITIALIZERS,
    load_content,
    one_for_all_slices,
    repeated_for_slices,
)
from upcycled_moe.conversion.source import open_source


HEADS, HEAD_DIM, HIDDEN = SHAPE["num_attention_heads"], 16, SHAPE["hidden_size"]


@pytest.fixture
def make_router(dense):
    """`make_router("linear", num_experts=8)`: initializer and tensors of layer 1, for activations drawn at random."""

    def make(router, layer_idx=1, means=None, **settings):
        # None of these is read: the activations below stand for the text.
        text = {"mixture": ["a"], "domain": ["a", "b"]}.get(router, [])
        recipe = ConversionRecipe(router=router, **{"calibration_data": text, **settings})
        generator = torch.Generator().manual_seed(7)
        keys = torch.randn(2, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
        drawn = torch.randn(recipe.num_domains, HIDDEN, generator=generator, dtype=torch.float64)
        activations = LayerActivations(layer_idx, *keys, ffn_inputs=[], domain_means=drawn if means is None else means)
        initializer = ROUTER_INITIALIZERS[router](open_source(str(dense())), recipe)
        tensors = initializer.tensors(layer_idx, activations)
        return initializer, {name: load_content(content) for name, content in tensors.items()}

    return make


def test_every_router_of_the_model_can_be_initialised():
    assert {initializer.router_type for initializer in ROUTER_INITIALIZERS.values()} == ROUTERS.keys()


def test_every_router_of_the_recipe_has_an_initializer():
    (choice,) = (field.type for field in ConversionRecipe.__dataclass_fields__.values() if field.name == "router")
    assert set(typing.get_args(choice)) == ROUTER_INITIALIZERS.keys()


SETTINGS = [
    {"num_experts": 4},
    {"num_experts": 8, "num_zero_experts": 1, "num_copy_experts": 2, "num_constant_experts": 1},
    {"num_experts": 8, "experts": "split"},
    {"num_experts": 12, "experts": "split", "expert_granularity": 3, "num_zero_experts": 4},
]


@pytest.mark.parametrize(
    ("router", "settings"),
    [
        (router, settings)
        for router in ROUTER_INITIALIZERS
        for settings in SETTINGS
        # What has no parameters cannot score slices alike; the recipe refuses it.
        if not (router == "grouped_average" and "experts" in settings)
    ],
)
def test_an_initializer_fills_the_models_router(make_router, router, settings):
    initializer, tensors = make_router(router, **settings)
    free = {name: value for name, value in settings.items() if name.startswith("num_")}
    # A grouped average needs equal parts of the token: 4 and 12 experts divide 48.
    hidden_size = 48 if router == "grouped_average" else HIDDEN
    config = UpcycledQwenMoeConfig(
        hidden_size=hidden_size, num_attention_heads=4, num_key_value_heads=4, **free, **initializer.config_fields()
    )
    module = ROUTERS[config.router_type](config)
    sizes = {name: value.numel() for name, value in module.named_parameters()}
    assert sizes == {name: value.numel() for name, value in tensors.items()}
    assert initializer.scaled_tensor in (tensors or [None])


def naive_scores(router, tensors, inputs, num_experts):
    """Return the scores [T, experts], one token and one expert at a time."""
    scores = torch.zeros(len(inputs), num_experts)
    for t, x in enumerate(inputs):
        for e in range(num_experts):
            if router == "mixture":
                keys = tensors["keys"]
                owned = len(keys) // num_experts
                queries = tensors["query_weight"].view(-1, keys.shape[1], len(x))
                scores[t, e] = max(sum((q @ x) @ k for q in queries) for k in keys[e * owned : (e + 1) * owned])
            elif router == "mlp":
                scores[t, e] = tensors["down_weight"][e] @ torch.nn.functional.gelu(tensors["up_weight"] @ x)
            else:
                scores[t, e] = tensors["weight"][e] @ x
    return scores


@pytest.mark.parametrize(
    ("router", "more"),
    [
        ("linear", {}),
        ("mlp", {}),
        ("domain", {}),
        ("mixture", {}),
        ("mixture", {"num_routers": 2}),
        ("mixture", {"num_routers": 2, "head_grouping": "random"}),
    ],
)
@pytest.mark.parametrize("num_free", [0, 2])
def test_slices_of_a_copy_score_alike(make_router, router, more, num_free):
    """Twelve slices make four copies: expert e is slice e // 4 of copy e % 4. Free experts come last, untouched."""
    _, tensors = make_router(
        router, num_experts=12, experts="split", expert_granularity=3, num_zero_experts=num_free, **more
    )
    inputs = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    scores = naive_scores(router, {name: value.float() for name, value in tensors.items()}, inputs, 12 + num_free)
    for expert in range(12):
        assert torch.equal(scores[:, expert], scores[:, expert % 4])
    columns = {tuple(column.tolist()) for column in scores.T}
    assert len(columns) == 4 + num_free
    # The same without slices: four experts and the free ones.
    _, whole = make_router(router, num_experts=4, num_zero_experts=num_free, **more)
    expected = naive_scores(router, {name: value.float() for name, value in whole.items()}, inputs, 4 + num_free)
    torch.testing.assert_close(scores[:, [*range(4), *range(12, 12 + num_free)]], expected)


def test_slices_share_all_keys_of_their_copy(make_router):
    """Sixteen routers for eight copies or free experts: two keys each."""
    settings = {"num_routers": 16, "num_zero_experts": 4}
    _, tensors = make_router("mixture", num_experts=12, experts="split", expert_granularity=3, **settings)
    _, whole = make_router("mixture", num_experts=4, **settings)
    keys, distinct = tensors["keys"].view(16, 2, -1), whole["keys"].view(8, 2, -1)
    for expert in range(12):
        assert torch.equal(keys[expert], distinct[expert % 4])
    assert torch.equal(keys[12:], distinct[4:])
    assert len({tuple(key.tolist()) for key in tensors["keys"]}) == 16


def test_rows_repeat_slice_by_slice_and_come_back():
    recipe = ConversionRecipe(
        router="linear", num_experts=6, experts="split", expert_granularity=3, num_zero_experts=1, num_copy_experts=1
    )
    rows = torch.arange(8).view(4, 2)
    expected = torch.stack([rows[e % 2] for e in range(6)] + [rows[2], rows[3]])
    repeated = repeated_for_slices(rows, recipe)
    assert torch.equal(repeated, expected)
    assert torch.equal(one_for_all_slices(repeated, recipe), rows)
    # Two keys an expert.
    keys = torch.arange(16).view(4, 2, 2)
    assert torch.equal(one_for_all_slices(repeated_for_slices(keys, recipe).flatten(0, 1), recipe), keys.flatten(0, 1))


@pytest.mark.parametrize(("router", "name"), [("linear", "weight"), ("mlp", "up_weight"), ("mlp", "down_weight")])
def test_a_random_router_is_drawn_for_its_layer_and_seed_alone(make_router, router, name):
    def draw(layer_idx, seed):
        return make_router(router, layer_idx, num_experts=4, seed=seed)[1][name]

    assert torch.equal(draw(0, seed=0), draw(0, seed=0))
    drawn = [draw(0, seed=0), draw(1, seed=0), draw(0, seed=1)]
    assert all(not torch.equal(one, other) for one, other in combinations(drawn, 2))
    assert drawn[0].std().item() == pytest.approx(SHAPE["initializer_range"], rel=0.3)


def test_the_two_layers_of_an_mlp_are_drawn_apart(make_router):
    tensors = make_router("mlp", num_experts=4)[1]
    assert not torch.equal(tensors["up_weight"][:4], tensors["down_weight"])


def test_a_domain_router_points_to_what_is_special_in_each_domain(make_router):
    means = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    initializer, tensors = make_router(
        "domain", num_experts=4, calibration_data=["a", "b", "c", "d"], means=means, num_copy_experts=2
    )
    weight = tensors["weight"].double()
    assert weight.shape == (6, HIDDEN)
    for expert in range(4):
        special = [
            means[expert, i].item() - sum(means[domain, i].item() for domain in range(4)) / 4 for i in range(HIDDEN)
        ]
        length = sum(value**2 for value in special) ** 0.5
        assert weight[expert].tolist() == pytest.approx([value / length for value in special], abs=1e-6)
    # Experts without computation belong to no domain; their rows are as long.
    torch.testing.assert_close(weight.norm(dim=-1), torch.ones(6, dtype=torch.float64))
    assert (weight[4:] @ weight.T).fill_diagonal_(0)[:, :4].abs().max() < 0.5
    assert initializer.describe() == "mean FFN inputs of 4 domains"


def test_experts_of_a_domain_differ_a_little(make_router):
    initializer, tensors = make_router("domain", num_experts=8)
    weight = torch.nn.functional.normalize(tensors["weight"], dim=-1)
    similarity = weight @ weight.T
    same = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool() & ~torch.eye(8, dtype=torch.bool)
    # A random part of a tenth: the cosine is about 1 / 1.01, and never one.
    assert ((similarity[same] > 0.95) & (similarity[same] < 0.9999)).all()
    # Two domains are one another's opposite.
    assert (similarity[:4, 4:] < -0.95).all()
    assert initializer.describe() == "mean FFN inputs of 2 domains, 4 experts each"
    assert torch.equal(tensors["weight"], make_router("domain", num_experts=8)[1]["weight"])
    assert not torch.equal(tensors["weight"], make_router("domain", num_experts=8, seed=1)[1]["weight"])


def test_domains_that_cannot_be_told_apart_are_refused(make_router):
    means = torch.randn(1, HIDDEN).expand(2, -1)
    with pytest.raises(
        SettingsError, match=r"^calibration_data: in layer 1 the text of domain 'a' is like that of all"
    ):
        make_router("domain", num_experts=4, means=means)


def test_random_groups_depend_on_seed_layer_and_tensor(make_router):
    def draw(layer_idx=0, seed=0, grouping="random"):
        settings = {"num_experts": 4, "num_routers": 2, "head_grouping": grouping, "seed": seed}
        return make_router("mixture", layer_idx, **settings)

    queries, keys = draw()[1].values()
    assert "2 routers of 2 randomly joined query heads" in draw()[0].describe()
    assert all(torch.equal(one, other) for one, other in zip(draw()[1].values(), (queries, keys), strict=True))
    others = [draw(seed=seed)[1]["keys"] for seed in range(1, 4)] + [draw(grouping="greedy")[1]["keys"]]
    assert any(not torch.equal(keys, other) for other in others)
    # Keys are of the same activations in both layers, so only the draw differs.
    assert any(not torch.equal(keys, draw(layer_idx)[1]["keys"]) for layer_idx in (1, 2))


def test_a_generator_depends_on_seed_and_name():
    states = [tensor_generator(seed, name).initial_seed() for seed in (0, 1) for name in ("a", "b")]
    assert len(set(states)) == 4
    assert tensor_generator(0, "a").initial_seed() == states[0]
