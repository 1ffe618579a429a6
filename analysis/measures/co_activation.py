"""Which experts are selected together.

Dimensions: L MoE layers, E experts to choose from, T tokens, K slots of a token.
"""

import math

import torch

from modeling_upcycled_moe.selection_upcycled_moe import sum_dtype

from ...common.moe_layers import RoutedTokens
from ..results import Figure, MeasureResult
from .domain_means import numbers
from .measure import Measure, Subject


# Of the fixed point for pairs by load; it is reached in a few dozen unless one expert is in nearly all pairs.
PAIRING_ITERATIONS = 1000


class CoActivation(Measure):
    """How often a token that selects one expert selects another too.

    Tables: `co_activation` [L][E][E], the share N_ij / N_i of the tokens of expert i that select expert j too; None on
    the diagonal and for an expert that no token selected.

    Source: OLMoE (arXiv 2409.02060, section 5.2).
    """

    name = "co_activation"
    figures = (
        Figure(
            name="co_activation",
            title="Co-activation with the closest partner",
            formula="Σ_i max_{j≠i} N_ij / Σ_i N_i",
            meaning=(
                "Of the tokens of an expert, the share that has its most frequent partner too, averaged over experts "
                "by their tokens: 1 if experts come in fixed pairs."
            ),
            source="shares: OLMoE (arXiv 2409.02060, section 5.2); the summary of a layer is ours",
        ),
        Figure(
            name="co_activation_by_load",
            title="Co-activation that the loads alone give",
            formula="Σ_i max_{j≠i} min(a_i a_j, N_i) / Σ_i N_i, a_i Σ_{j≠i} a_j = Σ_{j≠i} N_ij",
            meaning=(
                "About what co-activation would be if experts met by how often they are selected and nothing else: "
                "(K−1) / (E−1) if balanced. Experts pair up where the co-activation is clearly above it; a little is "
                "chance, for the most frequent of many partners is so by chance too."
            ),
            source=(
                "ours: quasi-independence (Goodman 1968), for much text; exact for two experts a token, an "
                "approximation for more"
            ),
        ),
    )

    def __init__(self, subject: Subject):
        super().__init__(subject)
        shape = len(subject.layers), subject.num_experts, subject.num_experts
        self._together = torch.zeros(shape, dtype=sum_dtype(subject.device), device=subject.device)  # [L, E, E]

    @torch.no_grad()
    def update(self, number: int, tokens: RoutedTokens) -> None:
        # Counts of one batch are exact in float32, whose matrix products are fast.
        is_selected = torch.zeros(
            len(tokens.selected), self.subject.num_experts + 1, device=tokens.selected.device
        ).scatter_(1, tokens.selected, 1.0)[:, :-1]  # [T, E]
        self._together[number] += (is_selected.T @ is_selected).to(self._together)

    def result(self) -> MeasureResult:
        together = self._together.cpu().double()
        counts = together.diagonal(dim1=-2, dim2=-1)  # [L, E]
        pairs = together - torch.diag_embed(counts)
        has_pairs = pairs.sum(dim=(-2, -1)) > 0  # [L]
        is_same = torch.eye(together.shape[-1], dtype=torch.bool)
        notes = []
        if not has_pairs.all():
            notes.append("Where no token has two experts there are no pairs.")
        return MeasureResult(
            per_layer={
                "co_activation": numbers(torch.where(has_pairs, _closest_partner(pairs, counts), math.nan)),
                "co_activation_by_load": numbers(
                    torch.where(has_pairs, _closest_partner(pairs_by_load(pairs), counts), math.nan)
                ),
            },
            tables={"co_activation": numbers((pairs / counts[:, :, None]).masked_fill(is_same, math.nan))},
            notes=notes,
        )


def _closest_partner(pairs: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the largest share of an expert's tokens that it has with one other, averaged over tokens [L].

    Args:
        pairs: tokens that two experts have together [L, E, E].
        counts: tokens of each expert [L, E].
    """
    # Where a token has three experts, pairs by load can be more than the tokens of one of them.
    return torch.minimum(pairs.amax(dim=-1), counts).sum(dim=-1) / counts.sum(dim=-1)


def pairs_by_load(pairs: torch.Tensor) -> torch.Tensor:
    """Return the pairs [L, E, E] that would be expected if experts met by how often they are in a pair, and only so.

    They are `a_i a_j` for i ≠ j, and zero on the diagonal, with the row sums of `pairs`.
    """
    totals = pairs.sum(dim=-1)  # [L, E]
    factors = totals / totals.sum(dim=-1, keepdim=True).clamp(min=1.0).sqrt()
    for _ in range(PAIRING_ITERATIONS):
        others = factors.sum(dim=-1, keepdim=True) - factors
        # The geometric mean with the factor before keeps the iteration from swinging.
        factors = torch.where(totals > 0, (factors * totals / others).sqrt(), 0.0)
    expected = factors[:, :, None] * factors[:, None, :]
    return expected - torch.diag_embed(expected.diagonal(dim1=-2, dim2=-1))
