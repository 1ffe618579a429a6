"""Whether the experts of a checkpoint are whole FFNs or slices of them, by the recipe of its conversion.

Dimensions: E experts with weights, G slices of an FFN, C = E / G copies of it.

Expert `g * C + c` is slice g of copy c.
"""

from collections.abc import Mapping
from typing import Any

from .moe_source import MoeSource
from .settings import SettingsError


RECIPE_WAY_OUT = "put the upcycling.json that the conversion wrote beside the weights"
_NEEDED = {"experts", "backbone", "shared_expert", "expert_granularity", "num_experts"}


def conversion_recipe(source: MoeSource) -> Mapping[str, Any] | None:
    """Return the recipe that `source` was converted by, None if it is not known."""
    recipe = (source.provenance or {}).get("recipe", {})
    return recipe if recipe.keys() >= _NEEDED else None


def num_expert_slices(source: MoeSource) -> int:
    """Return G; 1 where each expert is a whole FFN.

    Raises:
        SettingsError: if experts may be slices and the recipe is not known, or they are and not all copies of a slice
            can be told.
    """
    recipe, config = conversion_recipe(source), source.config
    if recipe is None:
        if config.moe_intermediate_size < config.intermediate_size:
            raise SettingsError(
                f"{source.name}: has experts narrower than the FFN, and no upcycling.json with the recipe that says "
                f"whether they are slices of it; {RECIPE_WAY_OUT}."
            )
        return 1
    if recipe["experts"] != "split":
        return 1
    num_slices = recipe["expert_granularity"]
    if config.num_experts not in (recipe["num_experts"], _num_left(source)) or config.num_experts % num_slices:
        raise SettingsError(
            f"{source.name}: was converted to {recipe['num_experts']} slices of FFNs and has {config.num_experts} "
            "experts; nothing says which slices are left, so take the checkpoint that had all."
        )
    return num_slices


def _num_left(source: MoeSource) -> int | None:
    """Return E after the last pruning, which keeps as many copies of each slice; None if there was none."""
    for step in reversed(source.provenance.get("steps", [])):
        if step.get("command") == "prune":
            numbers = step.get("num_experts")
            return numbers.get("after") if isinstance(numbers, dict) else None
    return None
