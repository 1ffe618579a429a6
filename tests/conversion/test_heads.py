from collections import Counter
from math import comb
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.conversion.heads import (
    coinciding_keys,
    cosine_similarity,
    expert_keys,
    group_heads,
    head_split,
    query_rows,
    random_groups,
)
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.routers import AttentionHeads
from upcycled_moe.conversion.source import DenseSource, open_source


# Pairs by similarity: (0,2) (1,3) (2,3) (1,2) (0,3) (0,1).
HAND_COMPUTED = torch.tensor(
    [
        [1.0, 0.1, 0.9, 0.2],
        [0.1, 1.0, 0.3, 0.8],
        [0.9, 0.3, 1.0, 0.5],
        [0.2, 0.8, 0.5, 1.0],
    ]
)


@pytest.mark.parametrize(
    ("num_groups", "group_size", "groups"),
    [
        (2, 2, [[0, 2], [1, 3]]),
        # Each served once: now the best pair that was not together, then the two that are left.
        (4, 2, [[0, 2], [1, 3], [2, 3], [0, 1]]),
        # 3 is nearer to 0 and 2 (0.2 + 0.5) than 1 is (0.1 + 0.3); then 1, which has not served, and its nearest.
        (2, 3, [[0, 2, 3], [1, 3, 2]]),
        (3, 1, [[0], [1], [2]]),
        (1, 4, [[0, 2, 3, 1]]),
    ],
)
def test_groups_computed_by_hand(num_groups, group_size, groups):
    assert group_heads(HAND_COMPUTED, num_groups, group_size) == groups


@pytest.mark.parametrize(
    ("num_units", "num_groups", "group_size"),
    [(16, 8, 2), (14, 8, 2), (12, 8, 2), (16, 16, 1), (28, 8, 4), (32, 64, 1), (40, 8, 5), (14, 4, 4), (5, 7, 3)],
)
def test_groups_use_every_unit_alike_and_none_twice(num_units, num_groups, group_size):
    units = torch.randn(num_units, 6, generator=torch.Generator().manual_seed(num_units))
    similarity = cosine_similarity(units)
    groups = group_heads(similarity, num_groups, group_size)
    assert [len(group) for group in groups] == [group_size] * num_groups
    assert all(len(set(group)) == group_size for group in groups)
    uses = Counter(unit for group in groups for unit in group)
    counts = [uses[unit] for unit in range(num_units)]
    assert max(counts) - min(counts) <= 1
    if group_size > 1:
        assert len({frozenset(group) for group in groups}) == num_groups
    assert group_heads(similarity.clone(), num_groups, group_size) == groups


@pytest.mark.parametrize(
    ("num_units", "num_groups", "group_size"),
    [(16, 8, 2), (16, 16, 1), (16, 8, 8), (14, 8, 2), (16, 32, 2), (16, 120, 2), (4, 8, 2), (5, 7, 3), (16, 8, 1)],
)
def test_random_groups_use_every_unit_alike_and_none_twice(num_units, num_groups, group_size):
    def draw(seed):
        return random_groups(num_units, num_groups, group_size, torch.Generator().manual_seed(seed))

    for groups in map(draw, range(20)):
        assert [len(group) for group in groups] == [group_size] * num_groups
        assert all(len(set(group)) == group_size for group in groups)
        # Groups differ, as long as there are different ones.
        assert len({frozenset(group) for group in groups}) == min(num_groups, comb(num_units, group_size))
        uses = Counter(unit for group in groups for unit in group)
        counts = [uses[unit] for unit in range(num_units)]
        # Within the first round there is nothing to repeat; later a pair may have to differ from an earlier one.
        assert max(counts) - min(counts) <= (1 if num_groups * group_size <= num_units else 2)
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_random_pairs_are_all_as_likely():
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(tuple(sorted(random_groups(4, 1, 2, generator)[0])) for _ in range(3000))
    assert len(drawn) == 6
    assert all(count == pytest.approx(500, rel=0.2) for count in drawn.values())


def test_the_first_pair_is_the_most_similar():
    units = torch.randn(10, 4, generator=torch.Generator().manual_seed(3))
    similarity = cosine_similarity(units)
    first = group_heads(similarity, 5, 2)[0]
    assert similarity[first[0], first[1]] == similarity.fill_diagonal_(-2).max()


def test_cosine_similarity_takes_a_unit_as_one_vector():
    units = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    for a in range(3):
        for b in range(3):
            expected = (units[a] * units[b]).sum() / (units[a].norm() * units[b].norm())
            assert cosine_similarity(units)[a, b].item() == pytest.approx(expected.item(), abs=1e-6)


# num_attention_heads, num_experts, num_routers, heads_per_router → R, J, units, unit size, heads per router (h = 16)
SPLITS = [
    (4, 4, None, None, (4, 4, 4, 16, 1)),
    (4, 2, None, None, (2, 2, 4, 16, 2)),
    (4, 4, 2, None, (2, 4, 4, 16, 2)),
    (4, 2, 4, None, (4, 4, 4, 16, 1)),
    (4, 8, 8, None, (8, 8, 8, 8, 1)),
    (4, 4, 16, None, (16, 16, 16, 4, 1)),
    (4, 8, 2, 3, (2, 8, 4, 16, 3)),
    (14, 8, None, None, (8, 8, 14, 16, 2)),
    # 14 heads cannot make 16 routers: as many routers as heads, of pairs, since 14 single heads make no 16 keys.
    (14, 16, None, None, (14, 16, 14, 16, 2)),
    (14, 64, None, None, (14, 64, 14, 16, 2)),
    # No part of a head unless it is asked for: routers one dimension wide leave most experts without a token.
    (16, 32, None, None, (16, 32, 16, 16, 2)),
    (4, 64, None, None, (4, 64, 4, 16, 2)),
]


@pytest.mark.parametrize(("num_units", "num_groups", "group_size"), [(14, 64, 2), (14, 91, 2), (8, 56, 3), (5, 10, 2)])
def test_groups_differ_as_long_as_there_are_different_ones(num_units, num_groups, group_size):
    units = torch.randn(num_units, 6, generator=torch.Generator().manual_seed(1))
    groups = group_heads(cosine_similarity(units), num_groups, group_size)
    assert len({frozenset(group) for group in groups}) == num_groups
    assert all(len(set(group)) == group_size for group in groups)


@pytest.mark.parametrize(("num_heads", "num_experts", "num_routers", "heads_per_router", "expected"), SPLITS)
def test_heads_become_routers(dense, num_heads, num_experts, num_routers, heads_per_router, expected):
    hidden_size = num_heads * 16
    source = open_source(str(dense(num_attention_heads=num_heads, hidden_size=hidden_size, tokenizer=False)))
    recipe = ConversionRecipe(num_experts=num_experts, num_routers=num_routers, heads_per_router=heads_per_router)
    split = head_split(source, recipe)
    num_routers, num_keys, num_units, unit_size, joined = expected
    assert (split.num_routers, split.num_keys, split.num_units, split.unit_size, split.heads_per_router) == expected
    assert split.router_head_dim == joined * unit_size

    q_proj = source.tensors["model.layers.1.self_attn.q_proj.weight"]
    rows = q_proj.load().view(num_units, unit_size, hidden_size)
    queries = query_rows(q_proj, split).load().view(num_routers, joined, unit_size, hidden_size)
    groups = group_heads(cosine_similarity(rows), num_routers, joined)
    for router, group in zip(queries, groups, strict=True):
        for part, unit in zip(router, group, strict=True):
            assert torch.equal(part, rows[unit])

    head_keys = torch.randn(num_heads, 16, generator=torch.Generator().manual_seed(0))
    keys = expert_keys(head_keys, split)
    assert keys.shape == (num_keys, split.router_head_dim)
    units = {tuple(unit.tolist()) for unit in head_keys.view(num_units, unit_size)}
    assert {tuple(unit.tolist()) for unit in keys.view(-1, unit_size)} <= units


@pytest.mark.parametrize(
    ("family", "asked", "chosen"),
    [
        ("qwen2", "auto", "attended"),
        ("qwen1.5", "auto", "mean"),
        ("qwen2", "mean", "mean"),
        ("qwen1.5", "attended", "attended"),
    ],
)
def test_auto_takes_the_statistic_that_tells_heads_apart(dense, family, asked, chosen):
    split = head_split(open_source(str(dense(family))), ConversionRecipe(num_experts=4, key_statistic=asked))
    assert split.key_statistic == chosen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 4, "num_routers": 6}, "num_routers=6 is above num_experts=4 and not a multiple of it"),
        ({"num_experts": 6, "num_routers": 6}, "4 heads of 16 do not split into as many equal parts"),
        ({"num_experts": 128, "num_routers": 128}, "do not split into as many equal parts"),
        ({"num_experts": 4, "heads_per_router": 5}, "heads_per_router=5 exceeds the 4 heads"),
    ],
)
def test_heads_that_cannot_become_routers(dense, settings, message):
    with pytest.raises(SettingsError, match=message):
        head_split(open_source(str(dense())), ConversionRecipe(**settings))


def test_coinciding_keys_are_counted_once_each():
    base = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert coinciding_keys(base) == 0
    assert coinciding_keys(torch.cat([base, base[:2], base[:1] * (1 + 1e-5)])) == 3
    # The same direction at another length scores differently: those experts can be told apart.
    assert coinciding_keys(torch.cat([base, base[:2] * 2])) == 0


def wide_source(num_heads=16, head_dim=64, num_key_value_heads=None):
    """Return a source that is nothing but its configuration: Qwen1.5-0.5B has 16 heads of 64."""
    config = Qwen2Config(
        hidden_size=num_heads * head_dim,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads or num_heads,
    )
    return DenseSource("wide", Path(), None, config, {})


# Routers, what is joined into each, width of a query, keys: Tables 3 and 4 of the paper, for 8 experts.
TABLE_3 = [(2, 8, 512, 8), (4, 4, 256, 8), (8, 2, 128, 8), (16, 1, 64, 16), (32, 1, 32, 32)]


@pytest.mark.parametrize(("num_routers", "heads_per_router", "router_head_dim", "num_keys"), TABLE_3)
@pytest.mark.parametrize("router_pooling", ["sum", "max"])
def test_the_papers_ablations_have_the_papers_shapes(
    num_routers, heads_per_router, router_head_dim, num_keys, router_pooling
):
    recipe = ConversionRecipe(num_experts=8, num_routers=num_routers, router_pooling=router_pooling)
    split = head_split(wide_source(), recipe)
    assert (split.heads_per_router, split.router_head_dim, split.num_keys) == (
        heads_per_router,
        router_head_dim,
        num_keys,
    )
    assert split.key_statistic == "mean"
    # Every part of every head serves, and equally often: in queries once, in keys as often as there are keys to fill.
    units = torch.randn(split.num_units, split.unit_size, generator=torch.Generator().manual_seed(0))
    for num_groups in (split.num_routers, split.num_keys):
        groups = group_heads(cosine_similarity(units), num_groups, split.heads_per_router)
        uses = Counter(unit for group in groups for unit in group)
        assert {uses[unit] for unit in range(split.num_units)} == {num_groups * heads_per_router // split.num_units}


@pytest.mark.parametrize(("heads_per_router", "router_head_dim"), [(1, 64), (2, 128)])
@pytest.mark.parametrize("num_routers", [8, 16])
def test_one_head_against_two(num_routers, heads_per_router, router_head_dim):
    recipe = ConversionRecipe(num_experts=8, num_routers=num_routers, heads_per_router=heads_per_router)
    split = head_split(wide_source(), recipe)
    assert (split.router_head_dim, split.num_keys) == (router_head_dim, num_routers)


@pytest.mark.parametrize(("num_experts", "num_heads", "head_dim"), [(16, 16, 64), (8, 16, 128)])
def test_the_papers_larger_models(num_experts, num_heads, head_dim):
    split = head_split(wide_source(num_heads, head_dim), ConversionRecipe(num_experts=num_experts))
    assert (split.num_routers, split.num_keys) == (num_experts, num_experts)
    assert split.router_head_dim == num_heads * head_dim // num_experts


@pytest.mark.parametrize("num_heads", [14, 16])
def test_any_number_of_experts_finds_its_heads(num_heads):
    for num_experts in range(2, 257):
        split = head_split(wide_source(num_heads, 64), ConversionRecipe(num_experts=num_experts))
        assert split.num_keys == num_experts
        # Enough different groups, so that no two experts need have the same key.
        assert comb(split.num_units, split.heads_per_router) >= num_experts


@pytest.mark.parametrize("settings", [{"num_zero_experts": 1}, {"experts": "split", "num_copy_experts": 5}])
def test_every_routed_expert_has_as_many_keys(settings):
    for num_experts in range(2, 257, 2):
        recipe = ConversionRecipe(num_experts=num_experts, calibration_data=["text.txt"], **settings)
        fields = AttentionHeads(wide_source(), recipe).config_fields()
        assert fields["num_router_keys"] % (num_experts + recipe.num_free_experts) == 0
        assert fields["num_routers"] == min(recipe.num_ffn_copies, 16)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Slices of a copy share their keys: routers and keys are those of the 4 copies.
        ({"num_experts": 8, "experts": "split"}, (4, 4, 4)),
        ({"num_experts": 16, "experts": "split", "expert_granularity": 4, "num_routers": 16}, (16, 16, 1)),
        # Experts without computation have keys too, but no further routers.
        ({"num_experts": 8, "num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 2}, (8, 12, 2)),
        ({"num_experts": 8, "experts": "split", "num_zero_experts": 4, "num_routers": 16}, (16, 16, 1)),
    ],
)
def test_experts_that_are_told_apart_have_keys(settings, expected):
    split = head_split(wide_source(), ConversionRecipe(**settings))
    assert (split.num_routers, split.num_keys, split.heads_per_router) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_experts": 8, "num_zero_experts": 1, "num_routers": 16},
            "num_routers=16 is above num_experts=8 + 1 experts without computation and not a multiple of it: every "
            "expert owns the same number of keys.",
        ),
        (
            {"num_experts": 12, "experts": "split", "num_routers": 8},
            "num_routers=8 is above num_experts=12 / expert_granularity=2 and not a multiple of it: every expert owns "
            "the same number of keys.",
        ),
    ],
)
def test_keys_that_cannot_be_shared_out_are_refused_in_the_recipes_words(settings, message):
    with pytest.raises(SettingsError) as error:
        head_split(wide_source(), ConversionRecipe(**settings))
    assert str(error.value) == message
