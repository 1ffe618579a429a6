"""What weights are merged from: matrices that are read from files, some rows at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..streaming.stored import StoredTensor


class MatrixSource(Protocol):
    """A matrix S_k of which rows can be had."""

    def rows(self, begin: int, end: int) -> Tensor:
        """Return the rows `begin` to `end`, in whatever floating type."""


@dataclass(frozen=True)
class StoredSource:
    """A part of a tensor on disk as a matrix, times a factor.

    A tensor of more dimensions than two is the matrix of its last one, and one of a single dimension has one row.

    Args:
        tensor: the tensor.
        index: into a tensor of matrices; None for a matrix.
        row, column: where the part begins.
        num_columns: how wide it is; None to the end.
        factor: what it is multiplied with.
    """

    tensor: StoredTensor
    index: int | None = None
    row: int = 0
    column: int = 0
    num_columns: int | None = None
    factor: float = 1.0

    def rows(self, begin: int, end: int) -> Tensor:
        """Return the rows `begin` to `end`; without a factor they are backed by the file."""
        matrix = self.tensor.load()
        if self.index is not None:
            matrix = matrix[self.index]
        matrix = as_matrix(matrix)
        stop = None if self.num_columns is None else self.column + self.num_columns
        part = matrix[self.row + begin : self.row + end, self.column : stop]
        return part if self.factor == 1.0 else part.float() * self.factor


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a view [rows, columns] of `tensor`, its last dimension being the columns."""
    return tensor.reshape(-1, tensor.shape[-1])


@dataclass(frozen=True)
class Blend:
    """A part of a parameter, or of a buffer, that is `Σ_k c_k S_k`.

    Args:
        parameter: its name.
        sources: S_1 to S_K.
        row, column: where the part begins, in the parameter as a matrix; see [`as_matrix`].
        shape: rows and columns of the part; None for all that follow.
    """

    parameter: str
    sources: Sequence[MatrixSource]
    row: int = 0
    column: int = 0
    shape: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Return the part of the parameter, or of its gradient, as a matrix that shares its memory.

        Raises:
            RuntimeError: if the tensor's memory is not contiguous.
        """
        rows, columns = self._ranges(tensor)
        return tensor.view(-1, tensor.shape[-1])[rows.start : rows.stop, columns.start : columns.stop]

    def overlaps(self, other: "Blend", tensor: Tensor) -> bool:
        """Return whether this and `other` have weights of the parameter `tensor` in common."""
        return all(
            max(mine.start, its.start) < min(mine.stop, its.stop)
            for mine, its in zip(self._ranges(tensor), other._ranges(tensor), strict=True)
        )

    def _ranges(self, tensor: Tensor) -> tuple[range, range]:
        num_columns = tensor.shape[-1]
        num_rows = tensor.numel() // num_columns
        if self.shape is None:
            return range(self.row, num_rows), range(self.column, num_columns)
        return range(self.row, self.row + self.shape[0]), range(self.column, self.column + self.shape[1])
