"""What the experts of a checkpoint are of the FFN that they are merged into.

Dimensions: E experts with weights, I width of the dense FFN, G slices of it, C = E / G copies of each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common.expert_slices import RECIPE_WAY_OUT, conversion_recipe, num_expert_slices
from ..common.moe_source import MoeSource
from ..common.output_factors import output_factors
from ..common.settings import SettingsError


@dataclass(frozen=True)
class ExpertLayout:
    """How experts make up FFNs.

    Args:
        moe_layers: the decoder layers that have experts.
        num_experts: E.
        num_slices: G; expert `g * C + c` is slice g of copy c. One where each expert is a whole FFN.
        width: I.
        routed_factor: what conversion multiplied the outputs of routed experts with, but for slices.
        shared_factor: what it multiplied that of the shared expert with; None if there is none.
        is_from_scratch: whether the experts are known to have started at random, and not from an FFN.
    """

    moe_layers: tuple[int, ...]
    num_experts: int
    num_slices: int
    width: int
    routed_factor: float
    shared_factor: float | None
    is_from_scratch: bool = False

    @property
    def has_shared_expert(self) -> bool:
        """Whether an expert sees every token."""
        return self.shared_factor is not None

    @property
    def num_copies(self) -> int:
        """C; whole FFNs that the routed experts make up."""
        return self.num_experts // self.num_slices

    def slice_of(self, number: int) -> range:
        """Return the experts that are slice `number`."""
        return range(number * self.num_copies, (number + 1) * self.num_copies)


def expert_layout(source: MoeSource) -> ExpertLayout:
    """Return how the experts of `source` make up FFNs, from its configuration and the recipe of its conversion.

    Raises:
        SettingsError: if they are no FFNs of one width, or the recipe is needed and not there, or of another model.
    """
    config, recipe = source.config, conversion_recipe(source)
    has_shared_expert = config.shared_expert_intermediate_size > 0
    factors, num_slices = (1.0, 1.0), num_expert_slices(source)
    if recipe is not None:
        _check_recipe(source, recipe)
        factors = output_factors(recipe["experts"], recipe["backbone"], recipe["shared_expert"])
    elif has_shared_expert:
        raise SettingsError(
            f"{source.name}: has a shared expert, and no upcycling.json with the recipe that says what experts were "
            f"multiplied with; {RECIPE_WAY_OUT}."
        )
    layout = ExpertLayout(
        moe_layers=tuple(config.moe_layers),
        num_experts=config.num_experts,
        num_slices=num_slices,
        width=num_slices * config.moe_intermediate_size,
        routed_factor=factors[0],
        shared_factor=factors[1] if has_shared_expert else None,
        is_from_scratch=recipe is not None and recipe["experts"] == "random",
    )
    _check_width(source, layout)
    return layout


def _check_recipe(source: MoeSource, recipe: Mapping[str, Any]) -> None:
    config = source.config
    shared_expert = config.shared_expert_gating if config.shared_expert_intermediate_size else "none"
    if recipe["shared_expert"] != shared_expert:
        raise SettingsError(
            f"{source.name}: upcycling.json says shared_expert={recipe['shared_expert']!r}, the model has "
            f"{shared_expert!r}; {RECIPE_WAY_OUT}."
        )


def _check_width(source: MoeSource, layout: ExpertLayout) -> None:
    config = source.config
    if layout.has_shared_expert and config.shared_expert_intermediate_size != layout.width:
        raise SettingsError(
            f"{source.name}: the shared expert is {config.shared_expert_intermediate_size} wide, the routed ones make "
            f"up an FFN of {layout.width}; only FFNs of one width can be merged."
        )
    if layout.width != config.intermediate_size and len(layout.moe_layers) < config.num_hidden_layers:
        raise SettingsError(
            f"{source.name}: experts make up FFNs of width {layout.width}, and the layers without experts have "
            f"intermediate_size={config.intermediate_size}; a dense Qwen model has one width in all layers."
        )
