"""How well a fresh Mixture-of-Experts model computes what its dense parent computes."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from modeling_upcycled_moe import SELECTIONS, UpcycledQwenMoeConfig

from .backbone import backbone_method
from .experts import EXPERTS, ROUNDED_SLICES_MEASURED, TIES_MEASURED
from .recipe import TEXT_ROUTERS, ConversionRecipe


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
        measured = f" ({start.measured})" if start.measured else ""
        return Preservation(start.preserves_function, f"experts are {start.describe(recipe)}{measured}")
    if recipe.experts != "split":
        return Preservation("exact", "experts are copies, and weights sum to one")
    if set(dtypes) != {"F32"} and (deviations := _deviations_in_16_bits(recipe, config)):
        return Preservation("approximate", "; ".join(deviations))
    return Preservation("exact", "the slices of a copy add up to it, and weights sum to one")


def _obstacle(recipe: ConversionRecipe, config: UpcycledQwenMoeConfig) -> str | None:
    """Return why the function is not preserved at all; None if nothing stands in the way."""
    if backbone_method(recipe) == "random":
        what = "all weights are" if recipe.experts == "random" else "all but the experts is"
        return f"{what} drawn at random"
    if recipe.expert_sources:
        return f"it joins {recipe.num_sources} dense models"
    if recipe.num_free_experts:
        return "experts without computation take a share of the weights"
    if not config.norm_topk_prob:
        return "routing weights do not sum to one (norm_topk_prob=false)"
    selection = SELECTIONS[config.router_selection]
    if selection.in_evaluation is not None and selection.leaves_empty_slots:
        return (
            f"in training, tokens that no expert chooses skip the layer (router_selection={config.router_selection})"
        )
    return _split_obstacle(recipe, config) if recipe.experts == "split" else None


def _split_obstacle(recipe: ConversionRecipe, config: UpcycledQwenMoeConfig) -> str | None:
    """Return why a token's experts need not be whole sets of slices of equal weight."""
    granularity, groups = recipe.expert_granularity, config.num_expert_groups or 1
    if config.num_experts_per_tok % granularity:
        return (
            f"num_experts_per_tok={config.num_experts_per_tok} is not a multiple of the {granularity} slices of a copy"
        )
    if SELECTIONS[config.router_selection].leaves_empty_slots:
        return f"router_selection={config.router_selection} may select some slices of a copy and not the others"
    if groups % granularity and granularity % groups:
        return f"num_expert_groups={groups} cut through the {granularity} kinds of slices"
    # Beside a bias scores are compared as they are, which may all be one; otherwise logits are, which still differ.
    has_saturated_scores = config.router_score_function == "sigmoid" and config.use_router_bias
    has_large_logits = recipe.router in TEXT_ROUTERS or recipe.target_logit_std is not None
    if has_saturated_scores and has_large_logits and _can_mix(recipe, config):
        return (
            "sigmoid scores of large logits are all one, and under use_router_bias a token then mixes slices of two "
            f"copies; {_unmixed(recipe)}"
        )
    return None


def _can_mix(recipe: ConversionRecipe, config: UpcycledQwenMoeConfig) -> bool:
    """Return whether a token may take slices of two copies that tie."""
    # Groups that hold one kind of slice each select by themselves, and so alike.
    is_slice_by_slice = (config.num_expert_groups or 1) % recipe.expert_granularity == 0
    return not is_slice_by_slice and config.num_experts_per_tok < config.num_experts


def _unmixed(recipe: ConversionRecipe) -> str:
    return f"router_selection=grouped_top_k with num_expert_groups={recipe.expert_granularity} rules it out"


def _deviations_in_16_bits(recipe: ConversionRecipe, config: UpcycledQwenMoeConfig) -> list[str]:
    """Return what 16 bits do to slices, with the measured figures."""
    granularity = recipe.expert_granularity
    deviations = []
    if granularity & (granularity - 1):
        deviations.append(f"down projections times {granularity} are rounded to 16 bits ({ROUNDED_SLICES_MEASURED})")
    if _can_mix(recipe, config):
        deviations.append(
            f"copies can tie in 16 bits, and a token then mixes slices of two copies ({TIES_MEASURED}); "
            f"{_unmixed(recipe)}"
        )
    return deviations
