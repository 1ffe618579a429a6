"""How routers start: each router type has an initializer, which knows what it needs and what it gives.

Dimensions: T tokens, H hidden size, E experts, R routers, J keys, D router head size.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..common.settings import SettingsError
from .experts import FileBytes
from .heads import expert_keys, head_split, query_rows
from .randomness import tensor_generator
from .recipe import ConversionRecipe
from .source import DenseSource


if TYPE_CHECKING:
    from .calibration import LayerActivations


class RouterInitializer:
    """Makes the routers of a conversion of `source` by `recipe`.

    Raises:
        SettingsError: if the recipe asks for what the source cannot give.
    """

    # The tensor that the logits grow with in proportion: scaling it scales them.
    scaled_tensor: ClassVar[str]
    # What the model card calls it, and the arXiv number of its source.
    method: ClassVar[str]
    paper: ClassVar[str]
    # Whether calibration has to collect attended keys too.
    attended_keys = False

    def __init__(self, source: DenseSource, recipe: ConversionRecipe):
        self.source = source
        self.recipe = recipe

    def config_fields(self) -> dict[str, Any]:
        """Return what the router adds to the configuration of the MoE model."""
        return {}

    def describe(self) -> str:
        """Return in a few words what the routers start from."""
        raise NotImplementedError

    def tensors(self, layer_idx: int, activations: "LayerActivations | None") -> dict[str, FileBytes | Tensor]:
        """Return the router tensors of a layer by name; `activations` is what it saw, None without text."""
        raise NotImplementedError


class RandomLinear(RouterInitializer):
    """Vanilla upcycling: a linear router [E, H] drawn from N(0, `initializer_range`).

    Source: Sparse Upcycling (arXiv 2212.05055).
    """

    scaled_tensor = "weight"
    method = "vanilla upcycling"
    paper = "2212.05055"

    def describe(self) -> str:
        return f"random, N(0, {self.source.config.initializer_range})"

    def tensors(self, layer_idx: int, activations: "LayerActivations | None") -> dict[str, FileBytes | Tensor]:
        generator = tensor_generator(self.recipe.seed, f"model.layers.{layer_idx}.mlp.gate.weight")
        weight = torch.empty(self.recipe.num_experts, self.source.config.hidden_size)
        return {"weight": weight.normal_(0.0, self.source.config.initializer_range, generator=generator)}


class AttentionHeads(RouterInitializer):
    """Router Upcycling: queries [R, D, H] and keys [J, D] from the attention heads of the same layer.

    Source: Router Upcycling (arXiv 2509.00679), equations 4 and 5.
    """

    scaled_tensor = "keys"
    method = "Router Upcycling"
    paper = "2509.00679"

    def __init__(self, source: DenseSource, recipe: ConversionRecipe):
        super().__init__(source, recipe)
        if not recipe.calibration_data:
            raise SettingsError(
                "router='mixture' averages attention keys over text; give calibration_data, or use router='linear'."
            )
        self.split = head_split(source, recipe)
        self.attended_keys = self.split.key_statistic == "attended"

    def config_fields(self) -> dict[str, Any]:
        return {
            "num_routers": self.split.num_routers,
            "num_router_keys": self.split.num_keys,
            "router_head_dim": self.split.router_head_dim,
            "router_pooling": self.recipe.router_pooling,
        }

    def describe(self) -> str:
        split, plural = self.split, "s" * (self.split.heads_per_router > 1)
        units = f"query head{plural}"
        if split.unit_size < self.source.head_dim:
            units = f"part{plural} ({split.unit_size} of {self.source.head_dim} wide)"
        return (
            f"{split.num_routers} routers of {split.heads_per_router} {units}, "
            f"{split.num_keys} {split.key_statistic} keys"
        )

    def tensors(self, layer_idx: int, activations: "LayerActivations | None") -> dict[str, FileBytes | Tensor]:
        q_proj = self.source.layer(layer_idx)["self_attn.q_proj.weight"]
        head_keys = activations.attended_keys if self.attended_keys else activations.mean_keys
        return {"query_weight": query_rows(q_proj, self.split), "keys": expert_keys(head_keys, self.split)}


ROUTER_INITIALIZERS = {"linear": RandomLinear, "mixture": AttentionHeads}


def router_contents(layer_idx: int, tensors: Mapping[str, FileBytes | Tensor]) -> dict[str, FileBytes | Tensor]:
    """Return the router tensors of a layer by their full names."""
    return {f"model.layers.{layer_idx}.mlp.gate.{name}": content for name, content in tensors.items()}
