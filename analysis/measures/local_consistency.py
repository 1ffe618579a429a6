"""Whether neighbouring tokens need the same experts, which a cache of experts lives on.

Dimensions: L MoE layers, B blocks, S their length, N segments of a block, E experts to choose from, M tokens of a
segment, or lengths of segments, C sizes of a cache.
"""

import math

import torch
import torch.nn.functional as F

from modeling_upcycled_moe.selection_upcycled_moe import sum_dtype

from ...common.moe_layers import RoutedTokens
from ..results import Figure, MeasureResult
from .domain_means import numbers
from .independent_counts import count_probabilities, largest_counts_bound
from .measure import Measure, Subject


# Those of the paper's code.
SEGMENT_LENGTHS = (4, 16, 64, 256)

# Of the figures of a layer; the tables have all.
MAIN_LENGTH = 16

# Sizes of the cache in experts of a token; the second is the one that the paper recommends, and that of the figures.
CACHE_RATIOS = (1, 2, 4)
MAIN_RATIO = 2

# Counts of selections that are held at a time, over tokens and experts.
CHUNK_COUNTS = 2**22


class LocalConsistency(Measure):
    """How well one group of experts serves a whole segment of neighbouring tokens.

    Segments are all runs of M tokens that lie in one document and one block. Tables: `segment_lengths` [M], and by
    them `segments` [M], how many there were, `srp` and `srp_by_load` [L][M]; `cache_sizes` [C] in experts, and `sch`
    and `sch_by_load` [L][M][C]. They are None where there was no segment of that length, or nothing selected in any.

    Source: Not All Models Suit Expert Offloading (arXiv 2505.16056); the definitions are those of its public code.
    """

    name = "local_consistency"
    figures = (
        Figure(
            name="srp",
            title=f"Segment routing best performance, {MAIN_LENGTH} tokens",
            formula="max_θ 2 Σ_{s,e: c_se ≥ θ} c_se / (M |{s,e: c_se ≥ θ}| + Σ_{s,e} c_se)",
            meaning=(
                "The best F1 score of predicting that all tokens of a segment select the experts that are selected "
                "there at least θ times, and no others: 1 if all tokens of a segment have the same experts."
            ),
            source="SRP: arXiv 2505.16056; segments within documents are ours",
        ),
        Figure(
            name="srp_by_load",
            title="Segment routing performance that the loads alone give",
            formula="SRP with Σ_e P(c_e = c), c_e ~ Binomial(M, a_e), for the share of counts c",
            meaning="What it would be on much text if tokens selected experts by their loads alone.",
            source="ours; exact",
        ),
        Figure(
            name="sch",
            title=f"Segment cache best hit rate, {MAIN_LENGTH} tokens, {MAIN_RATIO}K experts",
            formula="Σ_s Σ_{e ∈ top C of s} c_se / Σ_{s,e} c_se, C = 2K",
            meaning=(
                "The share of selections that a cache of C experts serves if it holds the best ones for each segment: "
                "1 if a segment never needs more than C experts. Where C is E it says nothing."
            ),
            source="SCH: arXiv 2505.16056; segments within documents are ours",
        ),
        Figure(
            name="sch_by_load",
            title="Segment cache hit rate that the loads alone give at most",
            formula="min_t (C t + Σ_e E[max(c_e − t, 0)]) / (M Σ_e a_e), c_e ~ Binomial(M, a_e)",
            meaning="A hit rate above it shows that neighbours need the same experts.",
            source="ours; an upper bound, mostly one to three per cent too high, up to seven in simulations",
        ),
    )

    def __init__(self, subject: Subject):
        super().__init__(subject)
        num_layers, num_experts = len(subject.layers), subject.num_experts
        num_experts_per_tok = subject.layers[0].num_experts_per_tok
        self.cache_sizes = [min(ratio * num_experts_per_tok, num_experts) for ratio in CACHE_RATIOS]  # [C]

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(num_layers, *shape, dtype=sum_dtype(subject.device), device=subject.device)

        self._selected = zeros(num_experts)  # [L, E]
        self._num_tokens = zeros()  # [L]
        self._num_segments = [zeros() for _ in SEGMENT_LENGTHS]  # [L] each
        self._count_frequencies = [zeros(length + 1) for length in SEGMENT_LENGTHS]  # [L, M + 1] each
        self._hits = [zeros(len(self.cache_sizes)) for _ in SEGMENT_LENGTHS]  # [L, C] each

    @torch.no_grad()
    def update(self, number: int, tokens: RoutedTokens) -> None:
        num_blocks, block_size = tokens.input_ids.shape
        num_experts = self.subject.num_experts
        selected = tokens.selected.view(num_blocks, block_size, -1)
        length = max(CHUNK_COUNTS // (block_size * num_experts), 1)
        for part, positions in zip(selected.split(length), tokens.position_ids.split(length), strict=True):
            is_selected = torch.zeros(*part.shape[:2], num_experts + 1, dtype=torch.int32, device=part.device)
            is_selected = is_selected.scatter_(2, part, 1)[..., :-1]  # [B, S, E]
            self._add(number, is_selected, document_numbers(positions))

    def _add(self, number: int, is_selected: torch.Tensor, documents: torch.Tensor) -> None:
        """Add blocks whose tokens have these experts [B, S, E] and documents [B, S]."""
        until = F.pad(is_selected.cumsum(dim=1, dtype=torch.int32), (0, 0, 1, 0))  # [B, S + 1, E]
        self._selected[number] += until[:, -1].sum(dim=0)
        self._num_tokens[number] += documents.numel()
        for at, length in enumerate(SEGMENT_LENGTHS):
            if length > documents.shape[1]:
                continue
            in_document = documents[:, length - 1 :] == documents[:, : documents.shape[1] - length + 1]  # [B, N]
            counts = (until[:, length:] - until[:, :-length]).flatten(0, 1)  # [B * N, E]
            weight = in_document.flatten().to(self._selected)
            self._num_segments[at][number] += weight.sum()
            frequencies = self._count_frequencies[at][number]
            frequencies.index_add_(0, counts.flatten(), weight.repeat_interleave(counts.shape[1]))
            largest = counts.sort(dim=-1, descending=True).values.cumsum(dim=-1)  # [B * N, E]
            for column, size in enumerate(self.cache_sizes):
                self._hits[at][number, column] += largest[:, size - 1].to(weight) @ weight

    def result(self) -> MeasureResult:
        shares = (self._selected / self._num_tokens[:, None]).cpu().double()  # [L, E]
        srp, sch = (torch.stack(each, dim=1) for each in (self._srp(), self._sch()))  # [L, M], [L, M, C]
        # What chance gives stands beside what there is only.
        srp_by_load = self._srp_by_load(shares).masked_fill(srp.isnan(), math.nan)
        sch_by_load = self._sch_by_load(shares).masked_fill(sch.isnan(), math.nan)
        main, ratio = SEGMENT_LENGTHS.index(MAIN_LENGTH), CACHE_RATIOS.index(MAIN_RATIO)
        notes = []
        if self.cache_sizes[ratio] == self.subject.num_experts:
            notes.append(f"A cache of {MAIN_RATIO}K experts holds all of them: its hit rate is 1.")
        if missing := [length for length, num in zip(SEGMENT_LENGTHS, self._totals(), strict=True) if not num]:
            notes.append(f"No document part in a block has {missing[0]} tokens: there are no such segments.")
        return MeasureResult(
            per_layer={
                "srp": numbers(srp[:, main]),
                "srp_by_load": numbers(srp_by_load[:, main]),
                "sch": numbers(sch[:, main, ratio]),
                "sch_by_load": numbers(sch_by_load[:, main, ratio]),
            },
            tables={
                "segment_lengths": list(SEGMENT_LENGTHS),
                "segments": self._totals(),
                "cache_sizes": self.cache_sizes,
                "srp": numbers(srp),
                "srp_by_load": numbers(srp_by_load),
                "sch": numbers(sch),
                "sch_by_load": numbers(sch_by_load),
            },
            notes=notes,
        )

    def _totals(self) -> list[int]:
        """Return the number of segments of each length; all layers see the same."""
        return [int(segments[0]) for segments in self._num_segments]

    def _srp(self) -> list[torch.Tensor]:
        return [best_performance(frequencies.cpu().double()) for frequencies in self._count_frequencies]

    def _sch(self) -> list[torch.Tensor]:
        hit_rates = []
        for length, frequencies, hits in zip(SEGMENT_LENGTHS, self._count_frequencies, self._hits, strict=True):
            total = frequencies @ torch.arange(length + 1).to(frequencies)  # [L]
            hit_rates.append((hits / total[:, None]).cpu().double())
        return hit_rates

    def _srp_by_load(self, shares: torch.Tensor) -> torch.Tensor:
        frequencies = [
            torch.stack([count_probabilities(length, layer).sum(dim=0) for layer in shares])
            for length in SEGMENT_LENGTHS
        ]
        return torch.stack([best_performance(each) for each in frequencies], dim=1)

    def _sch_by_load(self, shares: torch.Tensor) -> torch.Tensor:
        bounds = [
            [
                [largest_counts_bound(length, layer, size) / length for size in self.cache_sizes]
                for length in SEGMENT_LENGTHS
            ]
            for layer in shares
        ]
        hit_rates = torch.tensor(bounds, dtype=torch.float64) / shares.sum(dim=-1)[:, None, None]
        # Rounding must not make a cache of all experts miss.
        has_all = torch.tensor(self.cache_sizes) == shares.shape[-1]  # [C]
        return hit_rates.clamp(max=1.0).masked_fill(has_all, 1.0)


def document_numbers(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the number of each token's document in its block, for positions [B, S] that begin anew with each."""
    return (position_ids == 0).cumsum(dim=1)


def best_performance(count_frequencies: torch.Tensor) -> torch.Tensor:
    """Return the segment routing best performance [L]; NaN where there is no segment, or nothing selected in one.

    Args:
        count_frequencies: how often an expert is selected 0 to M times in a segment [L, M + 1].

    Source: Not All Models Suit Expert Offloading (arXiv 2505.16056), by its public code.
    """
    length = count_frequencies.shape[-1] - 1
    selections = count_frequencies * torch.arange(length + 1).to(count_frequencies)
    # Sums from each threshold up.
    matched = selections.flip(-1).cumsum(dim=-1).flip(-1)
    predicted = length * count_frequencies.flip(-1).cumsum(dim=-1).flip(-1)
    selected = selections.sum(dim=-1, keepdim=True)
    scores = 2 * matched / (predicted + selected)
    return torch.where(selected[..., 0] > 0, scores.nan_to_num(0.0).amax(dim=-1), math.nan)
