"""Which tensors the dense model has, and what each of them is made of.

Dimensions: E experts, H hidden size, I width of the dense FFN, G slices of it, C = E / G copies of each slice.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..common.moe_source import MoeSource
from ..common.settings import SettingsError
from ..common.streaming.contents import Computed, Content, FileBytes, joined, row_blocks
from ..common.streaming.planned import PlannedTensor, file_order, layer_of
from ..common.streaming.stored import DTYPES, StoredTensor
from .coefficients import MATRICES, MergeCoefficients
from .layout import ExpertLayout


@dataclass(frozen=True)
class Term:
    """A part of a stored matrix, and what it is multiplied with.

    Args:
        expert: index into a tensor of all experts; None for a matrix.
        row, column: where the part begins.
    """

    tensor: StoredTensor
    expert: int | None
    row: int
    column: int
    factor: float

    def rows(self, begin: int, end: int, width: int) -> Tensor:
        """Return `width` columns of the rows `begin` to `end` of the part, multiplied, in float64."""
        matrix = self.tensor.load()
        matrix = matrix if self.expert is None else matrix[self.expert]
        part = matrix[self.row + begin : self.row + end, self.column : self.column + width]
        return part.double() * self.factor


def dense_tensors(source: MoeSource, layout: ExpertLayout, coefficients: MergeCoefficients) -> list[PlannedTensor]:
    """Return all tensors of the dense model in file order: the source's own bytes, and merged FFNs.

    Source: XFT (arXiv 2404.15247) merges all experts of a layer by λ and coefficients that it learns, and UMM-RM
        (arXiv 2512.00724) does so for reward models; one set of coefficients a matrix, and slices, are our reading.
    """
    merged = {f"model.layers.{layer_idx}.mlp." for layer_idx in layout.moe_layers}
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
    prefix, hidden, width = f"model.layers.{layer_idx}.mlp.", source.config.hidden_size, layout.width
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    planned = []
    for matrix in MATRICES:
        name, shape = f"{prefix}{matrix}.weight", shapes[matrix]
        dtype = source.tensors[f"{prefix}experts.down_proj"].dtype
        slices = _slices(source, layout, coefficients, layer_idx, matrix)
        planned.append(PlannedTensor(name, dtype, shape, _content(name, dtype, shape, matrix, slices)))
    return planned


def _slices(
    source: MoeSource, layout: ExpertLayout, coefficients: MergeCoefficients, layer_idx: int, matrix: str
) -> tuple[tuple[Term, ...], ...]:
    """Return the terms of each slice of the merged matrix; one that counts nothing is left out."""
    prefix, width = f"model.layers.{layer_idx}.mlp.", layout.width // layout.num_slices
    values, is_down = coefficients.layers[layer_idx][matrix], matrix == "down_proj"
    fused = source.tensors[f"{prefix}experts.{'down_proj' if is_down else 'gate_up_proj'}"]
    shared_weight = 0.0 if coefficients.shared is None else coefficients.shared[layer_idx]
    # A router gives each slice 1 / G of what it would give the copy, for which conversion multiplied it with G.
    routed_factor = layout.routed_factor * layout.num_slices if is_down else 1.0
    slices = []
    for number in range(layout.num_slices):
        experts = layout.slice_of(number)
        total = math.fsum(values[expert] for expert in experts)
        terms = [
            Term(
                fused,
                expert,
                row=width if matrix == "up_proj" else 0,
                column=0,
                factor=(1 - shared_weight) * values[expert] / total / routed_factor,
            )
            for expert in experts
            if values[expert] > 0 and shared_weight < 1
        ]
        if shared_weight > 0:
            begin = number * width
            row, column, factor = (0, begin, layout.shared_factor) if is_down else (begin, 0, 1.0)
            tensor = source.tensors[f"{prefix}shared_expert.{matrix}.weight"]
            terms.append(Term(tensor, None, row, column, shared_weight / factor))
        slices.append(tuple(terms))
    return tuple(slices)


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
