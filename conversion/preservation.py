"""How well a fresh Mixture-of-Experts model computes what its dense parent computes."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from modeling_upcycled_moe import UpcycledQwenMoeConfig

from .backbone import backbone_method
from .experts import EXPERTS
from .recipe import ConversionRecipe


@dataclass(frozen=True)
class Preservation:
    """`exact` (but for rounding), `approximate` or `none`, and why."""

    level: Literal["exact", "approximate", "none"]
    reason: str


def preservation(recipe: ConversionRecipe, config: UpcycledQwenMoeConfig, dtypes: Collection[str]) -> Preservation:
    """Return how well the conversion by `recipe` preserves the function of the dense model.

    Args:
        config: configuration of the MoE model.
        dtypes: types of the experts, as safetensors calls them.
    """
    if obstacle := _obstacle(recipe, config):
        return Preservation("none", obstacle)
    start = EXPERTS[recipe.experts]
    if start.preserves_function != "exact":
        return Preservation(start.preserves_function, f"experts are {start.describe(recipe)}")
    granularity = recipe.expert_granularity
    if recipe.experts == "split" and granularity & (granularity - 1) and set(dtypes) != {"F32"}:
        return Preservation("approximate", f"down projections times {granularity} are rounded to 16 bits")
    if recipe.experts == "split":
        return Preservation("exact", "the slices of a copy add up to it, and weights sum to one")
    return Preservation("exact", "experts are copies, and weights sum to one")


def _obstacle(recipe: ConversionRecipe, config: UpcycledQwenMoeConfig) -> str | None:
    """Return why the function is not preserved at all; None if nothing stands in the way."""
    if recipe.expert_sources:
        return f"it joins {recipe.num_sources} dense models"
    if backbone_method(recipe) == "random":
        return "all but the experts is drawn at random"
    if recipe.num_zero_experts or recipe.num_copy_experts or recipe.num_constant_experts:
        return "experts without computation take a share of the weights"
    if not config.norm_topk_prob:
        return "routing weights do not sum to one (norm_topk_prob=false)"
    if config.router_selection == "expert_choice":
        return "in training, tokens that no expert chooses skip the layer (router_selection=expert_choice)"
    return _split_obstacle(recipe, config) if recipe.experts == "split" else None


def _split_obstacle(recipe: ConversionRecipe, config: UpcycledQwenMoeConfig) -> str | None:
    """Return why a token's experts need not be whole sets of slices of equal weight."""
    granularity, groups = recipe.expert_granularity, config.num_expert_groups or 1
    if config.num_experts_per_tok % granularity:
        return (
            f"num_experts_per_tok={config.num_experts_per_tok} is not a multiple of the {granularity} slices of a copy"
        )
    if config.router_selection == "top_p":
        return "router_selection=top_p may select some slices of a copy and not the others"
    if groups % granularity and granularity % groups:
        return f"num_expert_groups={groups} cut through the {granularity} kinds of slices"
    return None
