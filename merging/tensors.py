"""Which tensors the dense model has, and what each of them is made of.

Dimensions: E experts, H hidden size, I width of the dense FFN, G slices of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.moe_source import MoeSource
from ..common.settings import SettingsError
from ..common.streaming.contents import Computed, Content, FileBytes, joined, row_blocks
from ..common.streaming.planned import PlannedTensor, file_order, layer_of
from ..common.streaming.stored import DTYPES
from .coefficients import MATRICES, MergeCoefficients
from .ffn import FfnSlice, StoredPart, ffn_prefix, ffn_slices
from .layout import ExpertLayout


@dataclass(frozen=True)
class Term:
    """A part of a stored matrix, and what it is multiplied with."""

    part: StoredPart
    factor: float

    def rows(self, begin: int, end: int, width: int) -> Tensor:
        """Return `width` columns of the rows `begin` to `end` of the part, multiplied, in float64."""
        return self.part.rows(begin, end, width).double() * self.factor


def dense_tensors(source: MoeSource, layout: ExpertLayout, coefficients: MergeCoefficients) -> list[PlannedTensor]:
    """Return all tensors of the dense model in file order: the source's own bytes, and merged FFNs.

    Source: XFT (arXiv 2404.15247) merges all experts of a layer by λ and coefficients that it learns, and UMM-RM
        (arXiv 2512.00724) does so for reward models; one set of coefficients a matrix, and slices, are our reading.
    """
    merged = {ffn_prefix(layer_idx) for layer_idx in layout.moe_layers}
    planned = [
        PlannedTensor(name, tensor.dtype, tensor.shape, FileBytes.whole(tensor))
        for name, tensor in source.tensors.items()
        if layer_of(name) is None or ".".join(name.split(".")[:4]) + "." not in merged
    ]
    for layer_idx in layout.moe_layers:
        planned += _merged_ffn(source, layout, coefficients, layer_idx)
    return sorted(planned, key=file_order)


def _merged_ffn(
    source: MoeSource, layout: ExpertLayout, coefficients: MergeCoefficients, layer_idx: int
) -> list[PlannedTensor]:
    prefix, hidden, width = ffn_prefix(layer_idx), source.config.hidden_size, layout.width
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    shared_weight = 0.0 if coefficients.shared is None else coefficients.shared[layer_idx]
    planned = []
    for matrix in MATRICES:
        name, shape = f"{prefix}{matrix}.weight", shapes[matrix]
        dtype = source.tensors[f"{prefix}experts.down_proj"].dtype
        slices = tuple(
            _terms(ffn_slice, coefficients.layers[layer_idx][matrix], shared_weight)
            for ffn_slice in ffn_slices(source, layout, layer_idx, matrix)
        )
        planned.append(PlannedTensor(name, dtype, shape, _content(name, dtype, shape, matrix, slices)))
    return planned


def _terms(ffn_slice: FfnSlice, values: Sequence[float], shared_weight: float) -> tuple[Term, ...]:
    """Return the terms of a slice; one that counts nothing is left out."""
    total = math.fsum(values[expert] for expert in ffn_slice.experts)
    terms = [
        Term(part, (1 - shared_weight) * values[expert] / total / part.multiple)
        for expert, part in zip(ffn_slice.experts, ffn_slice.copies, strict=True)
        if values[expert] > 0 and shared_weight < 1
    ]
    if shared_weight > 0:
        terms.append(Term(ffn_slice.shared, shared_weight / ffn_slice.shared.multiple))
    return tuple(terms)


def _content(
    name: str, dtype: str, shape: tuple[int, int], matrix: str, slices: tuple[tuple[Term, ...], ...]
) -> Content:
    """Return the matrix in blocks of rows: slices are next to each other in `down_proj`, else below each other."""
    num_rows, num_columns = shape
    if matrix == "down_proj":
        groups, num_columns = [slices], num_columns // len(slices)
    else:
        groups, num_rows = [(terms,) for terms in slices], num_rows // len(slices)
    return joined(
        *(
            Computed((end - begin, shape[1]), _merged_rows, (name, dtype, group, begin, end, num_columns))
            for group in groups
            for begin, end in row_blocks((num_rows, shape[1]))
        )
    )


def _merged_rows(
    name: str, dtype: str, slices: tuple[tuple[Term, ...], ...], begin: int, end: int, width: int
) -> Tensor:
    """Return the rows `begin` to `end` of `slices` side by side, each the sum of its terms.

    The sum is in float64 and rounded at the end, so that copies give what they are copies of, to the bit. Products and
    sums are apart, as a fused one rounds otherwise at the edges of what a thread does.
    """
    sums = []
    for terms in slices:
        total = terms[0].rows(begin, end, width)
        for term in terms[1:]:
            total += term.rows(begin, end, width)
        sums.append(total)
    merged = torch.cat(sums, dim=1).to(DTYPES[dtype])
    if not torch.isfinite(merged).all():
        raise SettingsError(
            f"{name}: the merged weights are not finite in {dtype}; the experts hold infinite or undefined weights, "
            "or ones too large once what conversion halved is doubled; look at the checkpoint."
        )
    return merged
