"""All that is neither a routed expert nor a router: a copy, an average over dense models, or drawn at random."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .contents import Computed, Content, FileBytes, joined
from .experts import drawn_tensor
from .recipe import ConversionRecipe
from .source import SourceTensor


# An embedding fills gigabytes in float32, so what is computed here comes in blocks of rows.
BLOCK_ELEMENTS = 2**24


def copied(name: str, tensors: tuple[SourceTensor, ...], std: float, seed: int) -> Content:
    """Return the first model's own bytes."""
    return FileBytes.whole(tensors[0])


def averaged(name: str, tensors: tuple[SourceTensor, ...], std: float, seed: int) -> Content:
    """Return the mean over the models, summed in float32.

    Source: Branch-Train-MiX (arXiv 2403.07816).
    """
    return joined(
        *(Computed(shape, _mean_rows, (tensors, begin, end)) for begin, end, shape in _row_blocks(tensors[0].shape))
    )


def _mean_rows(tensors: tuple[SourceTensor, ...], begin: int, end: int) -> Tensor:
    total = tensors[0].load()[begin:end].float()
    for tensor in tensors[1:]:
        total = total + tensor.load()[begin:end]
    return total / len(tensors)


def drawn(name: str, tensors: tuple[SourceTensor, ...], std: float, seed: int) -> Content:
    """Return what a fresh model has: norms of one, biases of zero, matrices from N(0, `std`)."""
    shape = tensors[0].shape
    if len(shape) == 1:
        return Computed(shape, torch.zeros if name.endswith(".bias") else torch.ones, (shape,))
    return joined(
        *(
            Computed(block_shape, drawn_tensor, (block_shape, std, seed, f"{name}[{begin}]"))
            for begin, _, block_shape in _row_blocks(shape)
        )
    )


def _row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yield first row, last row and shape of each block."""
    num_rows = max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))
    for begin in range(0, shape[0], num_rows):
        end = min(begin + num_rows, shape[0])
        yield begin, end, (end - begin, *shape[1:])


# From a tensor's name in the result, the tensor in each dense model, `initializer_range` and seed to the content.
BACKBONES: dict[str, Callable[[str, tuple[SourceTensor, ...], float, int], Content]] = {
    "copy": copied,
    "average": averaged,
    "random": drawn,
}


def backbone_method(recipe: ConversionRecipe) -> str:
    """Return the key into `BACKBONES` that `recipe` asks for."""
    if recipe.backbone == "auto":
        return "average" if recipe.expert_sources else "copy"
    return recipe.backbone
