"""Each initialiser against a naive version that goes neuron by neuron."""

import itertools
import typing

import pytest
import torch
import torch.nn.functional as F

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.streaming import contents
from upcycled_moe.common.streaming.contents import Computed, FileBytes, parts_of
from upcycled_moe.common.streaming.stored import DTYPES
from upcycled_moe.conversion.experts import (
    EXPERTS,
    DenseFfn,
    add_noise,
    expert_width,
    fused_experts,
    mean_and_std,
    redraw,
)
from upcycled_moe.conversion.plan import build_plan
from upcycled_moe.conversion.randomness import tensor_generator
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.source import open_source


WIDTH, HIDDEN = 96, 64
NAME = "model.layers.1.mlp.experts"


def ffn_of(folder) -> DenseFfn:
    return DenseFfn.of_layer(open_source(str(folder)).layer(1))


def experts_of(ffns, recipe, initializer_range=0.1):
    """Return gate [E, I, H], up [E, I, H] and down [E, H, I] as the writer would write them."""
    fused = fused_experts(ffns, recipe, NAME, initializer_range)
    width, dtype = expert_width(recipe, WIDTH), DTYPES[ffns[0].gate.dtype]

    def written(content, *shape):
        parts = [part.load() if isinstance(part, FileBytes) else part() for part in parts_of(content)]
        return torch.cat([part.to(dtype).flatten() for part in parts]).view(recipe.num_experts, *shape)

    gate_up = written(fused["gate_up_proj"], 2 * width, HIDDEN)
    return gate_up[:, :width], gate_up[:, width:], written(fused["down_proj"], HIDDEN, width)


def neurons(gate, up, down):
    """Return the neurons of one FFN: (row of gate, row of up, column of down)."""
    return [(gate[i], up[i], down[:, i]) for i in range(len(gate))]


def dense_neurons(ffn: DenseFfn):
    return neurons(*(matrix.load() for matrix in ffn.matrices.values()))


def same_neuron(one, other):
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_are_one_run_of_the_sources_bytes(dense, linear_recipe, dtype):
    ffn = ffn_of(dense("qwen2", dtype=dtype))
    assert fused_experts([ffn], linear_recipe(num_experts=8), NAME, 0.1) == {
        "gate_up_proj": FileBytes.whole(ffn.gate, ffn.up, repeats=8),
        "down_proj": FileBytes.whole(ffn.down, repeats=8),
    }
    for expert in zip(*experts_of([ffn], linear_recipe()), strict=True):
        assert all(map(same_neuron, neurons(*expert), dense_neurons(ffn)))


def test_noise_is_of_each_matrix_own_size(dense, linear_recipe):
    ffn = ffn_of(dense())
    recipe = linear_recipe(experts="noise", expert_noise=0.05, seed=3)
    gate, up, down = experts_of([ffn], recipe)
    for kind, experts in {"gate_proj": gate, "up_proj": up, "down_proj": down}.items():
        weight = ffn.matrices[kind].load()
        std = (sum(float(w) ** 2 for w in (weight - weight.mean()).flatten()) / weight.numel()) ** 0.5
        differences = experts - weight
        for index, difference in enumerate(differences):
            noise = torch.empty(weight.shape)
            noise.normal_(0.0, 0.05 * std, generator=tensor_generator(3, f"{NAME}.{index}.{kind}"))
            assert torch.allclose(difference, noise, atol=1e-6)
            assert difference.std().item() == pytest.approx(0.05 * std, rel=0.05)
            assert abs(difference.mean().item()) < 5 * 0.05 * std / weight.numel() ** 0.5
        # Every expert has noise of its own.
        for one, other in itertools.combinations(differences.flatten(1), 2):
            assert abs(F.cosine_similarity(one, other, dim=0)) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ratio", "num_dropped"), [(0.5, 48), (0.1, 10), (0.99, 95), (1, 96)])
def test_drop_keeps_the_right_share_of_whole_neurons(dense, linear_recipe, dtype, ratio, num_dropped):
    ffn = ffn_of(dense("qwen2", dtype=dtype))
    dropped_sets = []
    for expert in zip(*experts_of([ffn], linear_recipe(experts="drop", drop_ratio=ratio)), strict=True):
        pairs = list(zip(neurons(*expert), dense_neurons(ffn), strict=True))
        kept = {number for number, (new, old) in enumerate(pairs) if same_neuron(new, old)}
        assert len(kept) == WIDTH - num_dropped
        for number, (new, old) in enumerate(pairs):
            if number not in kept:
                # Redrawn in all three matrices; a drawn number may happen to be the old one in 16 bits.
                assert all((a != b).double().mean() > 0.8 for a, b in zip(new, old, strict=True))
        dropped_sets.append(set(range(WIDTH)) - kept)
    if num_dropped < WIDTH:
        assert all(one != other for one, other in itertools.combinations(dropped_sets, 2))


@pytest.mark.parametrize("dim", [0, 1])
def test_redrawn_entries_have_mean_and_deviation_of_those_that_they_replace(dim):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(400, 300, generator=generator)
    dropped = torch.arange(0, 100, 3)
    # The replaced part differs from the rest, and its rows differ from each other.
    for number, index in enumerate(dropped.tolist()):
        weight.select(dim, index).mul_(3).add_(5 + number % 2)
    replaced = weight.index_select(dim, dropped)
    result = redraw(weight, dropped, dim, generator)
    redrawn = result.index_select(dim, dropped)
    assert redrawn.mean().item() == pytest.approx(replaced.mean().item(), abs=0.1)
    assert redrawn.std().item() == pytest.approx(replaced.std().item(), rel=0.03)
    assert abs(F.cosine_similarity((redrawn - 5.5).flatten(), (replaced - 5.5).flatten(), dim=0)) < 0.05
    rest = torch.tensor([index for index in range(weight.shape[dim]) if index not in set(dropped.tolist())])
    assert torch.equal(result.index_select(dim, rest), weight.index_select(dim, rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_experts", "granularity"), [(4, 2), (8, 4), (6, 3), (4, 4)])
def test_split_gives_neighbouring_experts_the_same_slice(dense, linear_recipe, dtype, num_experts, granularity):
    ffn = ffn_of(dense("qwen2", dtype=dtype))
    recipe = linear_recipe(num_experts=num_experts, experts="split", expert_granularity=granularity)
    all_neurons, width = dense_neurons(ffn), WIDTH // granularity
    for index, expert in enumerate(zip(*experts_of([ffn], recipe), strict=True)):
        number = index // (num_experts // granularity)
        slice_neurons = all_neurons[number * width : (number + 1) * width]
        for (gate, up, down), (old_gate, old_up, old_down) in zip(neurons(*expert), slice_neurons, strict=True):
            assert torch.equal(gate, old_gate)
            assert torch.equal(up, old_up)
            assert torch.equal(down, old_down * granularity)


@torch.no_grad()
def test_slices_of_equal_weight_add_up_to_a_gated_ffn(dense, linear_recipe):
    ffn = ffn_of(dense())
    gate, up, down = (
        weight.double()
        for weight in experts_of([ffn], linear_recipe(num_experts=8, experts="split", expert_granularity=4))
    )
    x = torch.randn(10, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(gate, up, down):
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    for copy in range(2):
        slices = [run(gate[e], up[e], down[e]) for e in range(copy, 8, 2)]
        expected = run(*(matrix.load().double() for matrix in ffn.matrices.values()))
        assert torch.allclose(sum(slices) / 4, expected, atol=1e-12)


def test_slices_of_gate_and_up_stream(dense, linear_recipe):
    fused = fused_experts([ffn_of(dense())], linear_recipe(experts="split", num_experts=8), NAME, 0.1)
    gate_up, down = map(parts_of, (fused["gate_up_proj"], fused["down_proj"]))
    # Two kinds of slices, each read once and written four times; the slices of `down` are computed.
    assert [(type(part), part.repeats) for part in gate_up] == [(FileBytes, 4)] * 2
    assert [type(part) for part in down] == [Computed] * 8
    assert down[0] == down[3] != down[4]


def test_random_experts_are_drawn_one_by_one(dense, linear_recipe):
    ffn = ffn_of(dense())
    recipe = linear_recipe(experts="random", seed=5)
    drawn = experts_of([ffn], recipe, initializer_range=0.07)
    for kind, experts in zip(ffn.matrices, drawn, strict=True):
        assert experts.std().item() == pytest.approx(0.07, rel=0.02)
        for index, expert in enumerate(experts):
            expected = torch.empty(expert.shape)
            expected.normal_(0.0, 0.07, generator=tensor_generator(5, f"{NAME}.{index}.{kind}[0]"))
            assert torch.equal(expert, expected)


@pytest.mark.parametrize("num_sources", [2, 4])
def test_several_models_have_equal_shares_of_the_experts(dense, linear_recipe, num_sources):
    ffns = [ffn_of(dense(seed=seed)) for seed in range(num_sources)]
    recipe = linear_recipe(num_experts=8, expert_sources=[f"other {number}" for number in range(1, num_sources)])
    for index, expert in enumerate(zip(*experts_of(ffns, recipe), strict=True)):
        assert all(map(same_neuron, neurons(*expert), dense_neurons(ffns[index // (8 // num_sources)])))
    fused = fused_experts(ffns, recipe, NAME, 0.1)
    assert [part.repeats for part in parts_of(fused["gate_up_proj"])] == [8 // num_sources] * num_sources


@pytest.mark.parametrize(("shared", "factor"), [("none", 1), ("sigmoid", 0.5), ("plain", 0.5), ("complement", 1)])
@pytest.mark.parametrize(("experts", "granularity"), [("copy", 1), ("split", 2)])
def test_what_a_shared_expert_adds_is_taken_from_the_others(
    dense, linear_recipe, shared, factor, experts, granularity
):
    ffn = ffn_of(dense("qwen2", dtype=torch.bfloat16))
    gate, _, down = experts_of([ffn], linear_recipe(experts=experts, shared_expert=shared))
    assert torch.equal(gate[0], ffn.gate.load()[: WIDTH // granularity])
    assert torch.equal(down[0], ffn.down.load()[:, : WIDTH // granularity] * (granularity * factor))


@pytest.mark.parametrize("experts", ["noise", "drop"])
def test_what_is_drawn_depends_on_seed_layer_and_expert_only(dense, linear_recipe, experts):
    ffn = ffn_of(dense())
    down = [experts_of([ffn], linear_recipe(experts=experts, seed=seed))[2] for seed in (0, 0, 1)]
    assert torch.equal(down[0], down[1])
    assert not torch.equal(down[0], down[2])
    assert not torch.equal(down[0][0], down[0][1])
    # An expert more does not change the others.
    assert torch.equal(experts_of([ffn], linear_recipe(experts=experts, num_experts=5))[2][:4], down[0])


def test_mean_and_deviation_do_not_depend_on_threads():
    matrix = torch.randn(3000, 257, generator=torch.Generator().manual_seed(0)) * 0.02 + 0.3
    mean, std = mean_and_std(matrix)
    assert mean == pytest.approx(matrix.double().mean().item(), rel=1e-12)
    assert std == pytest.approx(matrix.double().std(correction=0).item(), rel=1e-12)
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert mean_and_std(matrix) == (mean, std)
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("block_elements", [1, 1000])
def test_blocks_leave_no_row_out(monkeypatch, block_elements):
    weight = torch.randn(70, 90, generator=torch.Generator().manual_seed(0))
    whole = mean_and_std(weight)
    monkeypatch.setattr(contents, "BLOCK_ELEMENTS", block_elements)
    assert mean_and_std(weight) == pytest.approx(whole, rel=1e-12)
    noise = add_noise(weight, 0.1, torch.Generator().manual_seed(0)) - weight
    assert (noise != 0).all()
    assert noise.std().item() == pytest.approx(0.1 * whole[1], rel=0.05)
    dropped = torch.arange(40)
    redrawn = redraw(weight, dropped, 1, torch.Generator().manual_seed(0))
    assert (redrawn != weight).any(dim=0).tolist() == [True] * 40 + [False] * 50
    assert redrawn[:, :40].std().item() == pytest.approx(weight[:, :40].std().item(), rel=0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"experts": "split", "expert_granularity": 5, "num_experts": 10},
            "expert_granularity=5 does not divide the FFN's intermediate_size=96",
        ),
        ({"experts": "drop", "drop_ratio": 0.001}, "drop_ratio=0.001 redraws none of the FFN's 96 neurons; raise it."),
    ],
)
def test_what_does_not_fit_the_width_is_refused(dense, linear_recipe, settings, message):
    with pytest.raises(SettingsError) as error:
        build_plan(open_source(str(dense())), linear_recipe(**settings))
    assert message in str(error.value)


def test_every_way_in_the_recipe_is_there():
    assert set(EXPERTS) == set(typing.get_args(ConversionRecipe.__annotations__["experts"]))


@pytest.mark.parametrize(("dtype", "smallest_exact"), [(torch.float16, 2.0**-13), (torch.bfloat16, 2.0**-125)])
def test_halving_loses_bits_below_the_normal_numbers_only(dtype, smallest_exact):
    """What the docstring of `output_factors` says; trained weights in bfloat16 are never that small."""
    last_bit = 1 + torch.finfo(dtype).eps
    for weight, is_exact in ((smallest_exact * last_bit, True), (smallest_exact / 2 * last_bit, False)):
        value = torch.tensor(weight, dtype=torch.float64).to(dtype)
        assert value.double() == weight
        assert ((value * 0.5).double() * 2 == weight) == is_exact
