"""How routers start: each has an initializer, which knows what it needs and what it gives.

Dimensions: H hidden size, E experts that are told apart, R routers, J keys, D router head size. Where experts are
slices of copies (`split`), what scores a copy is made once, and `repeated_for_slices` gives it to all slices.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.settings import SettingsError
from ..common.streaming.contents import Computed, FileBytes
from .heads import expert_keys, head_split, query_rows
from .randomness import drawn_tensor, tensor_generator
from .recipe import ConversionRecipe
from .source import DenseSource


if TYPE_CHECKING:
    from .calibration import LayerActivations


RouterContent = FileBytes | Computed | Tensor

# Length of what tells experts of one domain apart, where the row that they share has length one.
WITHIN_DOMAIN_LENGTH = 0.1
# Domains whose mean is this near to the mean of all, in parts of its length, have nothing special.
COINCIDING_DOMAIN_DISTANCE = 1e-5


def router_tensor_name(layer_idx: int, name: str) -> str:
    """Return the full name of a router tensor; what is drawn for it depends on that."""
    return f"model.layers.{layer_idx}.mlp.gate.{name}"


def repeated_for_slices(rows: Tensor, recipe: ConversionRecipe) -> Tensor:
    """Return `rows` [E, ...] of copies and, last, of experts without computation as rows of all routed experts.

    Expert e, slice e // C of copy e % C of C, gets row e % C, so that all slices of a copy score alike.

    Source: virtual groups (arXiv 2410.07524).
    """
    num_copies = recipe.num_ffn_copies
    num_slices = recipe.num_experts // num_copies
    return torch.cat([*[rows[:num_copies]] * num_slices, rows[num_copies:]])


def one_for_all_slices(rows: Tensor, recipe: ConversionRecipe) -> Tensor:
    """Return the `rows` [E * rows of an expert, ...] that `repeated_for_slices` repeated."""
    num_rows = len(rows) // (recipe.num_experts + recipe.num_free_experts)
    return rows[(recipe.num_experts - recipe.num_ffn_copies) * num_rows :]


def load_content(content: RouterContent) -> Tensor:
    """Return `content` as a tensor, flat if it comes from a file."""
    if isinstance(content, FileBytes):
        return content.load()
    return content if isinstance(content, Tensor) else content()


class RouterInitializer:
    """Makes the routers of a conversion of `source` by `recipe`.

    Raises:
        SettingsError: if the recipe asks for what the source cannot give.
    """

    # What the model calls the router.
    router_type: ClassVar[str]
    # The tensor that the logits grow with in proportion: scaling it scales them. None if there is none.
    scaled_tensor: ClassVar[str | None]
    # What the model card calls it; its paper is in `papers.py`.
    method: ClassVar[str]
    # Whether calibration has to collect attended keys too.
    attended_keys = False

    def __init__(self, source: DenseSource, recipe: ConversionRecipe):
        self.source = source
        self.recipe = recipe

    def config_fields(self) -> dict[str, Any]:
        """Return what the router adds to the configuration of the MoE model."""
        return {"router_type": self.router_type}

    def describe(self) -> str:
        """Return in a few words what the routers start from."""
        raise NotImplementedError

    def tensors(self, layer_idx: int, activations: "LayerActivations | None") -> dict[str, RouterContent]:
        """Return the router tensors of a layer by name; `activations` is what it saw, None without text."""
        raise NotImplementedError

    def random_rows(self, layer_idx: int, tensor: str) -> Tensor:
        """Return a router tensor with a row [H] for each routed expert, from N(0, `initializer_range`)."""
        shape = (self.recipe.num_distinct_experts, self.source.config.hidden_size)
        std, name = self.source.config.initializer_range, router_tensor_name(layer_idx, tensor)
        return repeated_for_slices(drawn_tensor(shape, std, self.recipe.seed, name), self.recipe)


class RandomLinear(RouterInitializer):
    """Vanilla upcycling: a linear router [experts, H] drawn from N(0, `initializer_range`).

    Source: Sparse Upcycling (arXiv 2212.05055).
    """

    router_type = "linear"
    scaled_tensor = "weight"
    method = "vanilla upcycling"

    def describe(self) -> str:
        return f"random, N(0, {self.source.config.initializer_range})"

    def tensors(self, layer_idx: int, activations: "LayerActivations | None") -> dict[str, RouterContent]:
        return {"weight": self.random_rows(layer_idx, "weight")}


class RandomMLP(RouterInitializer):
    """Two layers [H, H] and [experts, H] drawn from N(0, `initializer_range`).

    Source: the MLP baseline of Router Upcycling (arXiv 2509.00679), table 1, which does not say how it is drawn.
    """

    router_type = "mlp"
    scaled_tensor = "down_weight"
    method = "vanilla upcycling with two-layer routers, a baseline of Router Upcycling"

    def describe(self) -> str:
        return f"two layers, random, N(0, {self.source.config.initializer_range})"

    def tensors(self, layer_idx: int, activations: "LayerActivations | None") -> dict[str, RouterContent]:
        config = self.source.config
        shape = (config.hidden_size, config.hidden_size)
        arguments = (shape, config.initializer_range, self.recipe.seed, router_tensor_name(layer_idx, "up_weight"))
        return {
            # Drawn when it is written: the matrices of all layers together may be gigabytes.
            "up_weight": Computed(shape, drawn_tensor, arguments),
            "down_weight": self.random_rows(layer_idx, "down_weight"),
        }


class GroupedAverage(RouterInitializer):
    """Averages of equal parts of the token, one for each expert: nothing to start from.

    Source: LocMoE (arXiv 2401.13920).
    """

    router_type = "grouped_average"
    scaled_tensor = None
    method = "vanilla upcycling with the router of LocMoE"

    def describe(self) -> str:
        return "averages of equal parts of the token, no parameters"

    def tensors(self, layer_idx: int, activations: "LayerActivations | None") -> dict[str, RouterContent]:
        return {}


class DomainMeans(RouterInitializer):
    """A linear router [experts, H] from what is special in the text of each expert's domain.

    The row of an expert is the average FFN input over its domain's text, less the mean of these averages over all
    domains, as a unit vector. Domains have equal runs of experts, in their order, as several dense models have. Where
    a domain has more than one, each of their rows also gets a random vector of about a tenth of that length,
    N(0, 0.1 / sqrt(H)), which tells them apart. Experts without computation get random unit vectors.
    `router_logit_std` scales all. Of several dense models the first one reads all texts.

    Source: our reading of Nexus (arXiv 2408.15901) and Branch-Train-MiX (arXiv 2403.07816). Both learn their router:
    Nexus projects embeddings of the domains, BTX starts at random. What is taken from them is that experts stand for
    domains, and from Nexus that a domain's text says where its expert is; nothing is learned here.
    """

    router_type = "linear"
    scaled_tensor = "weight"
    method = "routers from the texts of domains, in the manner of Nexus"

    def describe(self) -> str:
        recipe = self.recipe
        num_sharing = recipe.num_ffn_copies // recipe.num_domains
        return f"mean FFN inputs of {recipe.num_domains} domains" + f", {num_sharing} experts each" * (num_sharing > 1)

    def tensors(self, layer_idx: int, activations: "LayerActivations | None") -> dict[str, RouterContent]:
        recipe, means = self.recipe, activations.domain_means.float()
        special = means - means.mean(dim=0)  # [domains, H]
        lengths = special.norm(dim=-1)
        if (lengths <= COINCIDING_DOMAIN_DISTANCE * means.norm(dim=-1)).any():
            domain = recipe.calibration_data[int(lengths.argmin())]
            raise SettingsError(
                f"calibration_data: in layer {layer_idx} the text of domain {domain!r} is like that of all domains "
                "together; give text that differs."
            )
        generator = tensor_generator(recipe.seed, router_tensor_name(layer_idx, "weight"))
        num_sharing = recipe.num_ffn_copies // recipe.num_domains
        rows = F.normalize(special, dim=-1).repeat_interleave(num_sharing, dim=0)
        if num_sharing > 1:
            noise = torch.empty_like(rows).normal_(generator=generator)
            rows += WITHIN_DOMAIN_LENGTH / rows.shape[1] ** 0.5 * noise
        free_rows = torch.empty(recipe.num_free_experts, rows.shape[1]).normal_(generator=generator)
        rows = torch.cat([rows, F.normalize(free_rows, dim=-1)])
        return {"weight": repeated_for_slices(rows, recipe)}


class AttentionHeads(RouterInitializer):
    """Router Upcycling: queries [R, D, H] and keys [J, D] from the attention heads of the same layer.

    Source: Router Upcycling (arXiv 2509.00679), equations 4 and 5.
    """

    router_type = "mixture"
    scaled_tensor = "keys"
    method = "Router Upcycling"

    def __init__(self, source: DenseSource, recipe: ConversionRecipe):
        super().__init__(source, recipe)
        if not recipe.calibration_data:
            raise SettingsError(
                "router='mixture' averages attention keys over text; give calibration_data, or use router='linear'."
            )
        self.split = head_split(source, recipe)
        self.attended_keys = self.split.key_statistic == "attended"

    def config_fields(self) -> dict[str, Any]:
        keys_per_expert = self.split.num_keys // self.recipe.num_distinct_experts
        return super().config_fields() | {
            "num_routers": self.split.num_routers,
            "num_router_keys": keys_per_expert * (self.recipe.num_experts + self.recipe.num_free_experts),
            "router_head_dim": self.split.router_head_dim,
            "router_pooling": self.recipe.router_pooling,
        }

    def describe(self) -> str:
        split, plural = self.split, "s" * (self.split.heads_per_router > 1)
        units = f"query head{plural}"
        if split.unit_size < self.source.head_dim:
            units = f"part{plural} ({split.unit_size} of {self.source.head_dim} wide)"
        return (
            f"{split.num_routers} routers of {split.heads_per_router} "
            f"{'randomly joined ' * (self.recipe.head_grouping == 'random')}{units}, "
            f"{split.num_keys} {split.key_statistic} keys"
        )

    def tensors(self, layer_idx: int, activations: "LayerActivations | None") -> dict[str, RouterContent]:
        q_proj = self.source.layer(layer_idx)["self_attn.q_proj.weight"]
        head_keys = activations.attended_keys if self.attended_keys else activations.mean_keys
        keys = expert_keys(head_keys, self.split, self._grouping(layer_idx, "keys"))
        keys = keys.unflatten(0, (self.recipe.num_distinct_experts, -1))  # [E, J / E, D]
        return {
            "query_weight": query_rows(q_proj, self.split, self._grouping(layer_idx, "query_weight")),
            "keys": repeated_for_slices(keys, self.recipe).flatten(0, 1),
        }

    def _grouping(self, layer_idx: int, tensor: str) -> torch.Generator | None:
        """Return what draws the groups of heads, None if they are not drawn."""
        is_random = self.recipe.head_grouping == "random"
        return tensor_generator(self.recipe.seed, router_tensor_name(layer_idx, tensor)) if is_random else None


ROUTER_INITIALIZERS: dict[str, type[RouterInitializer]] = {
    "linear": RandomLinear,
    "mixture": AttentionHeads,
    "mlp": RandomMLP,
    "grouped_average": GroupedAverage,
    "domain": DomainMeans,
}


def router_contents(layer_idx: int, tensors: Mapping[str, RouterContent]) -> dict[str, RouterContent]:
    """Return the router tensors of a layer by their full names."""
    return {router_tensor_name(layer_idx, name): content for name, content in tensors.items()}
