"""What the matrices of a merged FFN are made of: parts of stored tensors, the same for every way to merge them.

Dimensions: E experts, H hidden size, I width of the dense FFN, G slices of it, C = E / G copies of each slice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..common.learned_merge.sources import StoredSource
from ..common.moe_source import MoeSource
from ..common.streaming.stored import StoredTensor
from .layout import ExpertLayout


@dataclass(frozen=True)
class StoredPart:
    """A part of a stored matrix, which conversion multiplied with something.

    Args:
        expert: index into a tensor of all experts; None for a matrix.
        row, column: where the part begins.
        multiple: what its weights are of those of the FFN.
    """

    tensor: StoredTensor
    expert: int | None
    row: int
    column: int
    multiple: float

    def rows(self, begin: int, end: int, width: int) -> Tensor:
        """Return `width` columns of the rows `begin` to `end` of the part as they are stored."""
        matrix = self.tensor.load()
        matrix = matrix if self.expert is None else matrix[self.expert]
        return matrix[self.row + begin : self.row + end, self.column : self.column + width]

    def source(self, width: int) -> StoredSource:
        """Return what a learned merge reads: `width` columns, with the weights of the FFN."""
        return StoredSource(self.tensor, self.expert, self.row, self.column, width, 1 / self.multiple)


@dataclass(frozen=True)
class FfnSlice:
    """A slice of a matrix of an FFN, and its copies.

    Args:
        number: of the slice.
        experts: the experts that are its copies.
        copies: the weights of these [C].
        shared: those of the shared expert; None if there is none.
        row, column: where it begins in the matrix.
        shape: its rows and columns.
    """

    number: int
    experts: Sequence[int]
    copies: tuple[StoredPart, ...]
    shared: StoredPart | None
    row: int
    column: int
    shape: tuple[int, int]


def ffn_prefix(layer_idx: int) -> str:
    """Return how the names of the tensors of a layer's FFN begin."""
    return f"model.layers.{layer_idx}.mlp."


def ffn_slices(source: MoeSource, layout: ExpertLayout, layer_idx: int, matrix: str) -> tuple[FfnSlice, ...]:
    """Return the slices of a matrix; they are next to each other in `down_proj`, else below each other."""
    return tuple(_slice(source, layout, layer_idx, matrix, number) for number in range(layout.num_slices))


def _slice(source: MoeSource, layout: ExpertLayout, layer_idx: int, matrix: str, number: int) -> FfnSlice:
    prefix, hidden, width = ffn_prefix(layer_idx), source.config.hidden_size, layout.width // layout.num_slices
    experts, begin = layout.slice_of(number), number * width
    if matrix == "down_proj":
        # A router gives each slice 1 / G of what it would give the copy, for which conversion multiplied it with G.
        fused, first_row, multiple = "down_proj", 0, layout.routed_factor * layout.num_slices
        shared_multiple, row, column, shape = layout.shared_factor, 0, begin, (hidden, width)
    else:
        fused, first_row, multiple = "gate_up_proj", width if matrix == "up_proj" else 0, 1.0
        shared_multiple, row, column, shape = 1.0, begin, 0, (width, hidden)
    tensor = source.tensors[f"{prefix}experts.{fused}"]
    shared = None
    if layout.has_shared_expert:
        shared = StoredPart(
            source.tensors[f"{prefix}shared_expert.{matrix}.weight"], None, row, column, shared_multiple
        )
    copies = tuple(StoredPart(tensor, expert, first_row, 0, multiple) for expert in experts)
    return FfnSlice(number, experts, copies, shared, row, column, shape)
