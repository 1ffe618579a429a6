"""Coefficients of experts as numbers that an optimizer moves.

Dimensions: E experts with weights, C copies of each of G slices of an FFN.
"""

from collections.abc import Sequence

import torch

from ..common.learned_merge.coefficients import SoftmaxCoefficients
from ..common.learned_merge.merge import BlendGroup
from ..common.learned_merge.sources import Blend
from ..common.moe_source import MoeSource
from .coefficients import MATRICES, MergeCoefficients
from .ffn import ffn_prefix, ffn_slices
from .layout import ExpertLayout


# Of an equal share: a softmax is never zero, and what is nearly zero gets next to no gradient.
LEAST_INITIAL_SHARE = 0.01


class LearnedFfns:
    """The FFNs of a dense model as `λ W_shared + (1 - λ) Σ_e softmax(a)_e W_e`; λ is fixed.

    There is an `a` [C] for each slice of an FFN: a softmax over all experts, scaled to one within a slice, is a
    softmax within the slice.

    Args:
        initial: the coefficients to start from; those that are nearly zero are lifted, and scaled with the others.
            Where `per` is `layer`, those of the first matrix.
        per: `layer` for an `a` that the matrices of a layer have in common, `matrix` for one each.

    Source: XFT (arXiv 2404.15247), with one `a` a layer. UMM-RM (arXiv 2512.00724) says that the average is learned,
        and not how. An `a` a matrix, and slices, are our reading.
    """

    def __init__(self, source: MoeSource, layout: ExpertLayout, initial: MergeCoefficients, per: str):
        self.layout = layout
        self.fixed = initial.shared
        # By layer and matrix, the coefficients of each slice.
        self._learned: dict[tuple[int, str], list[SoftmaxCoefficients]] = {}
        self.groups: list[BlendGroup] = []
        for layer_idx in layout.moe_layers:
            for matrices in [MATRICES] if per == "layer" else [(matrix,) for matrix in MATRICES]:
                self._add(source, initial, layer_idx, matrices)

    def coefficients(self) -> MergeCoefficients:
        """Return the coefficients as they are now; a slice has `1 / G` of them all, of which the merge makes one."""
        layers: dict[int, dict[str, tuple[float, ...]]] = {layer_idx: {} for layer_idx in self.layout.moe_layers}
        for (layer_idx, matrix), slices in self._learned.items():
            # In float64, so that they sum to one to the last digits.
            shares = [learned.logits.detach().double().softmax(dim=0) for learned in slices]
            layers[layer_idx][matrix] = tuple((torch.cat(shares) / self.layout.num_slices).tolist())
        return MergeCoefficients(layers, self.fixed)

    def _add(self, source: MoeSource, initial: MergeCoefficients, layer_idx: int, matrices: Sequence[str]) -> None:
        values = initial.layers[layer_idx][matrices[0]]
        fixed = () if self.fixed is None else (self.fixed[layer_idx],)
        slices = [
            SoftmaxCoefficients(_lifted([values[expert] for expert in self.layout.slice_of(number)]), fixed)
            for number in range(self.layout.num_slices)
        ]
        self._learned |= dict.fromkeys([(layer_idx, matrix) for matrix in matrices], slices)
        blends = {matrix: _blends(source, self.layout, layer_idx, matrix) for matrix in matrices}
        for number, learned in enumerate(slices):
            name = f"layer {layer_idx}"
            name += f", {matrices[0]}" * (len(matrices) == 1) + f", slice {number}" * (len(slices) > 1)
            self.groups.append(BlendGroup(name, learned, [blends[matrix][number] for matrix in matrices]))


def _blends(source: MoeSource, layout: ExpertLayout, layer_idx: int, matrix: str) -> list[Blend]:
    """Return what each slice of a matrix is made of, the shared expert first."""
    parameter = f"{ffn_prefix(layer_idx)}{matrix}.weight"
    return [
        Blend(
            parameter,
            [
                part.source(ffn_slice.shape[1])
                for part in ([ffn_slice.shared] * layout.has_shared_expert + [*ffn_slice.copies])
            ],
            ffn_slice.row,
            ffn_slice.column,
            ffn_slice.shape,
        )
        for ffn_slice in ffn_slices(source, layout, layer_idx, matrix)
    ]


def _lifted(values: Sequence[float]) -> list[float]:
    """Return shares that are all above zero, from `values` of which some are."""
    total, least = sum(values), LEAST_INITIAL_SHARE / len(values)
    return [max(value / total, least) for value in values]
