"""Which experts are bound to single words of the vocabulary.

Dimensions: L MoE layers, B blocks, S their length, T = B * S tokens, E experts to choose from, V token ids, W those
that are counted, K slots of a token.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...common.moe_layers import RoutedTokens
from ..results import Figure, MeasureResult
from .domain_means import numbers
from .independent_counts import largest_counts_bound
from .measure import Measure, Subject


# Token ids with fewer occurrences say little: one that occurs once has one expert. OLMoE's lists have none with fewer.
MIN_OCCURRENCES = 10

# Counts, of all layers together; as int32 they take 256 MiB.
MAX_COUNTS = 2**26

TOKENS_OF_EXPERT = 5

# Chance is computed for each small number of occurrences, then for numbers this far apart up to the last.
EXACT_OCCURRENCES = 100
OCCURRENCE_STEP = 1.25
MAX_OCCURRENCES = 1000


class VocabularySpecialization(Measure):
    """How much the expert of a token follows from the token itself, whatever its context.

    The expert of a token is the best of those it selects. Where the vocabulary is too large to be counted whole, the
    token ids that each domain shows first are, as many of each domain. Tables: `tokens` [L][E], for each expert up to
    five token ids that it is the most frequent expert of, `{"id", "token", "share", "occurrences"}`, those with the
    largest share first; `coverage` [L], the share of all tokens that the figures rest on.

    Source: OLMoE (arXiv 2409.02060, section 5.4).
    """

    name = "vocabulary"
    figures = (
        Figure(
            name="vocabulary_specialization",
            title="Vocabulary specialisation",
            formula=f"mean over x with N_x ≥ {MIN_OCCURRENCES} of max_e N_xe / N_x",
            meaning=(
                "Of the occurrences of a token id, the share whose best expert is its most frequent one, averaged "
                "over token ids: 1 if the token alone decides, near 1 / E if it decides nothing."
            ),
            source=(
                "OLMoE (arXiv 2409.02060, section 5.4, with its k = 1); the least number of occurrences is of its "
                "public code's lists, here for the mean too"
            ),
        ),
        Figure(
            name="vocabulary_specialization_by_load",
            title="Vocabulary specialisation that the loads alone give at most",
            formula="mean over x of min_t (t + Σ_e E[max(c_e − t, 0)]) / N_x, c_e ~ Binomial(N_x, f_e)",
            meaning=(
                "What chance gives if every token takes its best expert by the loads f, whatever it is: rare tokens "
                "look specialised by chance."
            ),
            source="ours; an upper bound, above 100 occurrences to three per cent",
        ),
    )

    def __init__(self, subject: Subject):
        super().__init__(subject)
        num_layers, num_experts = len(subject.layers), subject.num_experts
        vocab_size = subject.layers[0].config.vocab_size
        num_domains = len(subject.domains)
        self.rows_per_domain = max(MAX_COUNTS // (num_layers * (num_experts + 1) * num_domains), 1)
        if self.rows_per_domain * num_domains >= vocab_size:
            num_rows = vocab_size
            self._rows = torch.arange(vocab_size, device=subject.device)  # [V]
        else:
            num_rows = self.rows_per_domain * num_domains
            self._rows = torch.full((vocab_size,), -1, device=subject.device)  # [V]
        self._used_rows = torch.zeros(num_domains, dtype=torch.long, device=subject.device)  # [D]
        # The last row is of token ids that are not counted, the last column of tokens without an expert.
        self._counts = torch.zeros(
            num_layers, num_rows + 1, num_experts + 1, dtype=torch.int32, device=subject.device
        )  # [L, W + 1, E + 1]
        self._batch: torch.Tensor | None = None

    @torch.no_grad()
    def update(self, number: int, tokens: RoutedTokens) -> None:
        if tokens.input_ids is not self._batch:
            # All layers see the same tokens.
            self._batch = tokens.input_ids
            for block in tokens.input_ids:
                self._give_rows(tokens.domain, block)
        num_rows, num_columns = self._counts.shape[1:]
        rows = self._rows[tokens.input_ids.flatten()] % num_rows  # -1 is the last one
        index = rows * num_columns + best_experts(tokens)
        self._counts[number].view(-1).index_add_(0, index, torch.ones_like(index, dtype=torch.int32))

    def _give_rows(self, domain: int, block: torch.Tensor) -> None:
        """Give the token ids of `block` [S] that have none a row, as long as the domain has some left.

        Block by block, so that the rows do not depend on the batch; on the device, so that nothing is read back.
        """
        is_new = torch.zeros_like(self._rows, dtype=torch.bool).index_fill_(0, block, True) & (self._rows < 0)
        order = self._used_rows[domain] + is_new.cumsum(dim=0) - 1
        is_new &= order < self.rows_per_domain
        self._rows = torch.where(is_new, domain * self.rows_per_domain + order, self._rows)
        self._used_rows[domain] += is_new.sum()

    def result(self) -> MeasureResult:
        ids = self._ids_by_row()
        layers = [self._layer(counts.cpu().long(), ids) for counts in self._counts]
        notes = []
        if len(ids) < len(self._rows):
            num_counted = int((ids >= 0).sum())
            notes.append(
                f"Counted are {num_counted} of {len(self._rows)} token ids, those that each domain shows first; "
                "checkpoints with another number of layers or experts count others."
            )
        if any(layer["share"] is None for layer in layers):
            notes.append(f"No token id occurs {MIN_OCCURRENCES} times.")
        return MeasureResult(
            per_layer={
                "vocabulary_specialization": [layer["share"] for layer in layers],
                "vocabulary_specialization_by_load": [layer["by_load"] for layer in layers],
            },
            tables={
                "tokens": [layer["tokens"] for layer in layers],
                "coverage": [layer["coverage"] for layer in layers],
            },
            notes=notes,
        )

    def _ids_by_row(self) -> torch.Tensor:
        """Return the token id of each row [W], -1 where there is none."""
        rows = self._rows.cpu()
        ids = torch.full((self._counts.shape[1],), -1)
        ids[rows] = torch.arange(len(rows))  # those without a row land in the last one
        return ids[:-1]

    def _layer(self, counts: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
        """Return the figures and tables of a layer with these counts [W + 1, E + 1]."""
        loads = counts[:, :-1].sum(dim=0) / counts[:, :-1].sum().clamp(min=1)  # [E]
        of_id = counts[:-1, :-1]  # [W, E]
        occurrences = of_id.sum(dim=-1)
        is_frequent = occurrences >= MIN_OCCURRENCES
        of_id, occurrences, ids = of_id[is_frequent], occurrences[is_frequent], ids[is_frequent]
        largest, expert = of_id.max(dim=-1)
        share = largest.double() / occurrences
        by_load = share_by_load(occurrences, loads.double())
        return {
            "share": numbers(share.mean()),
            "by_load": numbers(by_load.mean()),
            "tokens": self._tokens(ids, expert, share, occurrences),
            "coverage": occurrences.sum().item() / max(counts.sum().item(), 1),
        }

    def _tokens(
        self, ids: torch.Tensor, expert: torch.Tensor, share: torch.Tensor, occurrences: torch.Tensor
    ) -> list[list[dict[str, Any]]]:
        """Return the token ids [W] with the largest share of each expert [E], the more frequent first among equals."""
        order = occurrences.argsort(descending=True, stable=True)
        order = order[share[order].argsort(descending=True, stable=True)]
        tokenizer = self.subject.tokenizer
        return [
            [
                {
                    "id": ids[at].item(),
                    "token": None if tokenizer is None else tokenizer.decode([ids[at].item()]),
                    "share": share[at].item(),
                    "occurrences": occurrences[at].item(),
                }
                for at in order[expert[order] == number][:TOKENS_OF_EXPERT].tolist()
            ]
            for number in range(self.subject.num_experts)
        ]


def best_experts(tokens: RoutedTokens) -> torch.Tensor:
    """Return the selected expert with the highest score of each token [T]; E if it has none.

    By the scores, since weights in bfloat16 have ties, and not all selections put the best expert first.
    """
    scores = F.pad(tokens.log_probabilities, (0, 1), value=-math.inf).gather(-1, tokens.selected)
    return tokens.selected.gather(-1, scores.argmax(dim=-1, keepdim=True))[:, 0]


def share_by_load(occurrences: torch.Tensor, loads: torch.Tensor) -> torch.Tensor:
    """Return the share [W] of the most frequent expert by chance, at most, for so many `occurrences` [W].

    Above `EXACT_OCCURRENCES` it is interpolated in the logarithm of the occurrences; beyond `MAX_OCCURRENCES` it falls
    to the largest load as one over their square root, as deviations by chance do.

    Args:
        loads: shares of tokens whose best expert each is [E].
    """
    if not len(occurrences):
        return torch.empty(0, dtype=torch.float64)
    steps = list(range(MIN_OCCURRENCES, EXACT_OCCURRENCES + 1))
    while steps[-1] < min(MAX_OCCURRENCES, occurrences.max()):
        steps.append(min(math.ceil(steps[-1] * OCCURRENCE_STEP), MAX_OCCURRENCES))
    bounds = torch.tensor([largest_counts_bound(step, loads, 1) / step for step in steps], dtype=torch.float64)
    within = occurrences.clamp(max=steps[-1]).double().log().numpy()
    shares = torch.from_numpy(np.interp(within, np.log(steps), bounds.numpy()))
    least = loads.max().double()
    return least + (shares - least) * (steps[-1] / occurrences.double()).clamp(max=1.0).sqrt()
