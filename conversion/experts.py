"""How experts start: from a layer's dense FFN to the fused tensors of its experts.

Dimensions: E experts, H hidden size, I width of the dense FFN, G slices of it, C = E / G copies of each slice.

An initialiser is a function for one expert and an entry in `EXPERTS`. It reads nothing: what it returns says which
bytes to copy, and what to compute when the expert is written.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from ..common.output_factors import output_factors
from ..common.settings import SettingsError
from ..common.streaming.contents import Computed, Content, FileBytes, Part, joined, paired, row_blocks, scaled
from ..common.streaming.stored import StoredTensor
from .randomness import drawn_tensor, tensor_generator
from .recipe import ConversionRecipe


@dataclass(frozen=True)
class DenseFfn:
    """The matrices of a dense FFN: `gate` and `up` [I, H], `down` [H, I]."""

    gate: StoredTensor
    up: StoredTensor
    down: StoredTensor

    @classmethod
    def of_layer(cls, layer: Mapping[str, StoredTensor]) -> "DenseFfn":
        """Return the FFN of the layer with these tensors."""
        return cls(*(layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))

    @property
    def width(self) -> int:
        """Its neurons, I."""
        return self.gate.shape[0]

    @property
    def matrices(self) -> dict[str, StoredTensor]:
        """The matrices by name, in the order in which initialisers return theirs."""
        return {"gate_proj": self.gate, "up_proj": self.up, "down_proj": self.down}


@dataclass(frozen=True)
class NewExpert:
    """The expert that an initialiser makes.

    Args:
        index: from 0 to E - 1.
        name: e.g. `model.layers.3.mlp.experts.5`; what is drawn at random depends on it.
    """

    index: int
    name: str
    recipe: ConversionRecipe
    initializer_range: float


# From a dense FFN and the expert to make of it to the content of its gate, up and down projection.
Initializer = Callable[[DenseFfn, NewExpert], tuple[Content, Content, Content]]


def copied_expert(ffn: DenseFfn, expert: NewExpert) -> tuple[Part, Part, Part]:
    """Return a copy of the dense FFN: the source's own bytes, which stream.

    Source: Sparse Upcycling (arXiv 2212.05055); Router Upcycling (arXiv 2509.00679), equation 3.
    """
    return tuple(FileBytes.whole(matrix) for matrix in ffn.matrices.values())


def noisy_expert(ffn: DenseFfn, expert: NewExpert) -> tuple[Part, Part, Part]:
    """Return a copy of the dense FFN with `expert_noise` times the standard deviation of each matrix as noise."""
    recipe = expert.recipe
    return tuple(
        Computed(matrix.shape, _noisy, (matrix, recipe.expert_noise, recipe.seed, f"{expert.name}.{name}"))
        for name, matrix in ffn.matrices.items()
    )


def _noisy(matrix: StoredTensor, noise: float, seed: int, name: str) -> Tensor:
    return add_noise(matrix.load(), noise, tensor_generator(seed, name))


def partly_redrawn_expert(ffn: DenseFfn, expert: NewExpert) -> tuple[Part, Part, Part]:
    """Return a copy of the dense FFN in which `drop_ratio` of the neurons are redrawn.

    One set of neurons serves all three matrices: a neuron is a row of gate and up and a column of down, and it is
    redrawn as a whole or kept as a whole. The script published with the paper draws a set for each matrix; with a
    ratio of 0.5 that leaves 0.5³ = 12.5 % of the neurons as they were, where the paper's text says 50 %.

    Source: Drop-Upcycling (arXiv 2502.19261).
    """
    recipe, num_dropped = expert.recipe, num_dropped_neurons(expert.recipe, ffn.width)
    return tuple(
        Computed(matrix.shape, _redrawn, (matrix, name, num_dropped, recipe.seed, expert.name))
        for name, matrix in ffn.matrices.items()
    )


def num_dropped_neurons(recipe: ConversionRecipe, width: int) -> int:
    """Return how many of `width` neurons `drop` redraws in each expert."""
    return round(recipe.drop_ratio * width)


def _redrawn(matrix: StoredTensor, name: str, num_dropped: int, seed: int, expert_name: str) -> Tensor:
    dim = 1 if name == "down_proj" else 0
    # The neurons are drawn by the expert's name alone, and so the same for its three matrices.
    order = torch.randperm(matrix.shape[dim], generator=tensor_generator(seed, f"{expert_name}.neurons"))
    return redraw(matrix.load(), order[:num_dropped], dim, tensor_generator(seed, f"{expert_name}.{name}"))


def slice_of_ffn(ffn: DenseFfn, expert: NewExpert) -> tuple[Part, Part, Part]:
    """Return slice g of G of the dense FFN, I/G neighbouring neurons, for expert g * C + c.

    A gated FFN is a sum over its neurons, and linear in `down`: FFN(x) = Σ_g slice_g(x). A router that scores all
    slices of a copy alike gives each of them 1/G of what the copy would weigh, so `down` is multiplied by G, and the
    mixture equals the dense FFN. (`gate` and `up` have to stay: silu(gate x) is not linear in them.) The slices of a
    kind come one after the other, the virtual groups of the paper, for selections that take as many of each group.

    Source: Upcycling Large Language Models into Mixture of Experts (arXiv 2410.07524).
    """
    granularity = expert.recipe.expert_granularity
    number = expert.index // (expert.recipe.num_experts // granularity)
    gate, up = (
        FileBytes(((matrix, number * (matrix.num_bytes // granularity), matrix.num_bytes // granularity),))
        for matrix in (ffn.gate, ffn.up)
    )
    hidden, width = ffn.down.shape[0], ffn.width // granularity
    columns = Computed((hidden, width), _columns, (ffn.down, number * width, width))
    return gate, up, scaled(columns, granularity)


def _columns(matrix: StoredTensor, begin: int, width: int) -> Tensor:
    return matrix.load()[:, begin : begin + width]


def random_expert(ffn: DenseFfn, expert: NewExpert) -> tuple[Content, Content, Content]:
    """Return an expert drawn from N(0, `initializer_range`), as of a model from scratch."""
    return tuple(
        drawn_content(matrix.shape, expert.initializer_range, expert.recipe.seed, f"{expert.name}.{name}")
        for name, matrix in ffn.matrices.items()
    )


def drawn_content(shape: tuple[int, ...], std: float, seed: int, name: str) -> Content:
    """Return the content of a matrix drawn from N(0, std), in blocks of rows."""
    blocks = ((begin, (end - begin, *shape[1:])) for begin, end in row_blocks(shape))
    return joined(*(Computed(block, drawn_tensor, (block, std, seed, f"{name}[{begin}]")) for begin, block in blocks))


@dataclass(frozen=True)
class ExpertStart:
    """A way in which experts start.

    Args:
        initialize: makes one expert.
        description: ends "experts are ...", with the fields of the recipe in braces.
        preserves_function: how well such experts compute what the dense FFN does, while their weights sum to one.
        measured: how far from its parent the fresh model is, where it is `approximate`.
    """

    initialize: Initializer
    description: str
    preserves_function: Literal["exact", "approximate", "none"]
    measured: str | None = None

    def describe(self, recipe: ConversionRecipe) -> str:
        """Return the description of the experts of `recipe`."""
        return self.description.format(**recipe.to_dict(), num_copies=recipe.num_ffn_copies)


# How far fresh models are from their parent, that of `benchmarks/initializations.py`: mean KL divergence in nats.
NOISE_MEASURED = "KL from the parent on a small model: 2e-7 at 0.01, 2e-5 at 0.1, 5e-4 at 0.5"
# The same parent in bfloat16, cut into 11 slices, and into 2 to 8; 8 copies of each, two of them active.
ROUNDED_SLICES_MEASURED = "KL from the parent on a small model: 2e-8"
TIES_MEASURED = "about 0.3 % of tokens, KL from the parent on a small model 3e-5, where other rounding makes 1e-5"

EXPERTS = {
    "copy": ExpertStart(copied_expert, "copies of the FFN", "exact"),
    "noise": ExpertStart(
        noisy_expert,
        "copies of the FFN with noise of {expert_noise:g} standard deviations",
        "approximate",
        NOISE_MEASURED,
    ),
    "drop": ExpertStart(
        partly_redrawn_expert, "copies of the FFN with {drop_ratio:.3g} of its neurons redrawn", "none"
    ),
    "split": ExpertStart(slice_of_ffn, "{num_copies} copies of the FFN, each in {expert_granularity} slices", "exact"),
    "random": ExpertStart(random_expert, "drawn at random", "none"),
}


def expert_width(recipe: ConversionRecipe, dense_width: int) -> int:
    """Return the width of an expert made of a dense FFN with `dense_width` neurons.

    Raises:
        SettingsError: if the recipe does not fit that many.
    """
    if recipe.experts == "drop" and num_dropped_neurons(recipe, dense_width) == 0:
        raise SettingsError(
            f"drop_ratio={recipe.drop_ratio} redraws none of the FFN's {dense_width} neurons; raise it."
        )
    if recipe.experts != "split":
        return dense_width
    if dense_width % recipe.expert_granularity:
        raise SettingsError(
            f"expert_granularity={recipe.expert_granularity} does not divide the FFN's "
            f"intermediate_size={dense_width}: slices are of one size."
        )
    return dense_width // recipe.expert_granularity


def fused_experts(
    ffns: Sequence[DenseFfn], recipe: ConversionRecipe, name: str, initializer_range: float
) -> dict[str, Content]:
    """Return the content of a layer's fused expert tensors.

    `gate_up_proj` [E, 2I, H] is each expert's gate and then its up projection, `down_proj` [E, H, I] the down
    projections. With several dense models the experts come from them in equal shares, in their order.

    Args:
        ffns: the layer's FFN in each dense model.
        name: the experts' module, e.g. `model.layers.3.mlp.experts`.
    Source: Branch-Train-MiX (arXiv 2403.07816) for several models.
    """
    gate_up, down = [], []
    routed_factor, _ = output_factors(recipe.experts, recipe.backbone, recipe.shared_expert)
    for index in range(recipe.num_experts):
        ffn = ffns[index * len(ffns) // recipe.num_experts]
        expert = NewExpert(index, f"{name}.{index}", recipe, initializer_range)
        gate_content, up_content, down_content = EXPERTS[recipe.experts].initialize(ffn, expert)
        gate_up.append(paired(gate_content, up_content))
        down.append(scaled(down_content, routed_factor))
    return {"gate_up_proj": joined(*gate_up), "down_proj": joined(*down)}


def add_noise(weight: Tensor, noise: float, generator: Generator) -> Tensor:
    """Return `weight` with N(0, std) added, `std` being `noise` times its own standard deviation."""
    _, std = mean_and_std(weight)
    result = torch.empty_like(weight)
    for begin, end in row_blocks(weight.shape):
        result[begin:end] = _drawn_like(weight[begin:end], 0.0, noise * std, generator) + weight[begin:end]
    return result


def redraw(weight: Tensor, dropped: Tensor, dim: int, generator: Generator) -> Tensor:
    """Return `weight` with the rows (`dim` 0) or columns (1) `dropped` redrawn.

    They are drawn from N(mean, std) of all the entries that they replace; the others keep their bytes.
    """
    drawn = weight.index_select(dim, dropped)
    mean, std = mean_and_std(drawn)
    for begin, end in row_blocks(drawn.shape):
        drawn[begin:end] = _drawn_like(drawn[begin:end], mean, std, generator)
    return weight.index_copy(dim, dropped, drawn)


def _drawn_like(block: Tensor, mean: float, std: float, generator: Generator) -> Tensor:
    return torch.empty(block.shape).normal_(mean, std, generator=generator)


def mean_and_std(matrix: Tensor) -> tuple[float, float]:
    """Return mean and standard deviation of all entries of `matrix`, the same to the bit on any number of threads."""
    sums: list[float] = []
    squares: list[float] = []
    for begin, end in row_blocks(matrix.shape):
        block = matrix[begin:end].double()
        # A row is summed by one thread in a fixed order; all rows together would be by as many as there are.
        sums += block.sum(dim=1).tolist()
        squares += block.square_().sum(dim=1).tolist()
    mean = math.fsum(sums) / matrix.numel()
    return mean, math.sqrt(max(0.0, math.fsum(squares) / matrix.numel() - mean**2))
