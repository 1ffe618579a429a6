"""All that is neither a routed expert nor a router: a copy, an average over dense models, or drawn at random."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..common.streaming.contents import Computed, Content, FileBytes, joined, row_blocks
from ..common.streaming.stored import StoredTensor
from .experts import drawn_content
from .recipe import ConversionRecipe


def copied(name: str, tensors: tuple[StoredTensor, ...], std: float, seed: int) -> Content:
    """Return the first model's own bytes."""
    return FileBytes.whole(tensors[0])


def averaged(name: str, tensors: tuple[StoredTensor, ...], std: float, seed: int) -> Content:
    """Return the mean over the models, summed in float32.

    Source: Branch-Train-MiX (arXiv 2403.07816).
    """
    shape = tensors[0].shape
    return joined(
        *(Computed((end - begin, *shape[1:]), _mean_rows, (tensors, begin, end)) for begin, end in row_blocks(shape))
    )


def _mean_rows(tensors: tuple[StoredTensor, ...], begin: int, end: int) -> Tensor:
    total = torch.zeros(end - begin, *tensors[0].shape[1:])
    for tensor in tensors:
        total += tensor.load()[begin:end]
    return total / len(tensors)


def drawn(name: str, tensors: tuple[StoredTensor, ...], std: float, seed: int) -> Content:
    """Return what a fresh model has: norms of one, biases of zero, matrices from N(0, `std`)."""
    shape = tensors[0].shape
    if len(shape) == 1:
        return Computed(shape, torch.zeros if name.endswith(".bias") else torch.ones, (shape,))
    return drawn_content(shape, std, seed, name)


# From a tensor's name in the result, the tensor in each dense model, `initializer_range` and seed to the content.
BACKBONES: dict[str, Callable[[str, tuple[StoredTensor, ...], float, int], Content]] = {
    "copy": copied,
    "average": averaged,
    "random": drawn,
}


def backbone_method(recipe: ConversionRecipe) -> str:
    """Return the key into `BACKBONES` that `recipe` asks for."""
    if recipe.backbone == "auto":
        return "average" if recipe.expert_sources else "copy"
    return recipe.backbone
