"""What a tensor of the result is made of: bytes of the source, which stream, and what is computed when written."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .stored import DTYPES, StoredTensor


@dataclass(frozen=True)
class FileBytes:
    """Content that is bytes of the source: `spans` of (tensor, first byte, bytes), all of it `repeats` times."""

    spans: tuple[tuple[StoredTensor, int, int], ...]
    repeats: int = 1

    @classmethod
    def whole(cls, *tensors: StoredTensor, repeats: int = 1) -> "FileBytes":
        """Return all bytes of `tensors`, one after the other."""
        return cls(tuple((tensor, 0, tensor.num_bytes) for tensor in tensors), repeats)

    def load(self) -> Tensor:
        """Return the content as one flat tensor."""
        parts = [
            tensor.load().view(-1).view(torch.uint8)[begin : begin + num_bytes]
            for tensor, begin, num_bytes in self.spans
        ]
        return torch.cat(parts * self.repeats).view(DTYPES[self.spans[0][0].dtype])


@dataclass(frozen=True)
class Computed:
    """Content that `function(*arguments)` computes when it is written: a tensor of `shape`.

    Two of the same function and arguments are equal, so that what stands several times in a row is computed once.
    """

    shape: tuple[int, ...]
    function: Callable[..., Tensor]
    arguments: tuple[Any, ...] = ()

    def __call__(self) -> Tensor:
        return self.function(*self.arguments)


# What is computed element by element comes in blocks of rows of about this size.
BLOCK_ELEMENTS = 2**20

Part = FileBytes | Computed
# Several parts are written one after the other; only one of them is in memory at a time.
Content = Part | tuple[Part, ...]


def parts_of(content: Content) -> tuple[Part, ...]:
    """Return the parts of `content` in their order."""
    return content if isinstance(content, tuple) else (content,)


def joined(*contents: Content) -> Content:
    """Return `contents` as one; bytes of the source that stand several times in a row become repeats, read once."""
    joined_parts: list[Part] = []
    for part in (part for content in contents for part in parts_of(content)):
        last = joined_parts[-1] if joined_parts else None
        if isinstance(part, FileBytes) and isinstance(last, FileBytes) and part.spans == last.spans:
            joined_parts[-1] = replace(last, repeats=last.repeats + part.repeats)
        else:
            joined_parts.append(part)
    return joined_parts[0] if len(joined_parts) == 1 else tuple(joined_parts)


def paired(first: Content, second: Content) -> Content:
    """Return two contents one after the other; bytes of the source become one part, so that the pair can repeat."""
    if isinstance(first, FileBytes) and isinstance(second, FileBytes) and first.repeats == second.repeats == 1:
        return FileBytes(first.spans + second.spans)
    return joined(first, second)


def scaled(content: Content, factor: float) -> Content:
    """Return `content` times `factor`: exact by a power of two, as long as results are normal numbers."""
    if factor == 1:
        return content
    parts = tuple(Computed(_shape(part), _scaled_part, (part, factor)) for part in parts_of(content))
    return parts if isinstance(content, tuple) else parts[0]


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the first row of each block, and the first after it."""
    num_rows = max(1, BLOCK_ELEMENTS // math.prod(shape[1:]))
    for begin in range(0, shape[0], num_rows):
        yield begin, min(begin + num_rows, shape[0])


def num_computed_elements(content: Content) -> int:
    """Return the size of the largest part that is computed, 0 if none is."""
    return max((math.prod(part.shape) for part in parts_of(content) if isinstance(part, Computed)), default=0)


def _shape(part: Part) -> tuple[int, ...]:
    if isinstance(part, Computed):
        return part.shape
    (tensor, _, num_bytes), *others = part.spans
    if not others and part.repeats == 1 and num_bytes == tensor.num_bytes:
        return tensor.shape
    span_bytes = sum(num_bytes for _, _, num_bytes in part.spans)
    return (part.repeats * span_bytes // DTYPES[tensor.dtype].itemsize,)


def _scaled_part(part: Part, factor: float) -> Tensor:
    value = part() if isinstance(part, Computed) else part.load().view(_shape(part))
    return value * factor
