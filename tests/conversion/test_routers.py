from itertools import combinations

import pytest
import torch

from modeling_upcycled_moe import ROUTERS
from upcycled_moe.conversion.randomness import tensor_generator
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.routers import ROUTER_INITIALIZERS, RandomLinear
from upcycled_moe.conversion.source import open_source


def test_every_router_of_the_model_can_be_initialised():
    assert ROUTER_INITIALIZERS.keys() == ROUTERS.keys()


def test_a_random_router_is_drawn_for_its_layer_and_seed_alone(dense):
    source = open_source(str(dense()))

    def draw(layer_idx, seed):
        recipe = ConversionRecipe(router="linear", num_experts=4, seed=seed)
        return RandomLinear(source, recipe).tensors(layer_idx, None)["weight"]

    assert torch.equal(draw(0, seed=0), draw(0, seed=0))
    drawn = [draw(0, seed=0), draw(1, seed=0), draw(0, seed=1)]
    assert all(not torch.equal(one, other) for one, other in combinations(drawn, 2))
    assert drawn[0].std().item() == pytest.approx(source.config.initializer_range, rel=0.3)


def test_a_generator_depends_on_seed_and_name():
    states = [tensor_generator(seed, name).initial_seed() for seed in (0, 1) for name in ("a", "b")]
    assert len(set(states)) == 4
    assert tensor_generator(0, "a").initial_seed() == states[0]
