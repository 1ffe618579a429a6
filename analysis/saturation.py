"""Router saturation: how much of the routing of one checkpoint another has too.

Dimensions: L MoE layers, T tokens, E experts to choose from, K slots of a token, B blocks, S their length.
"""

from dataclasses import dataclass

import torch

from ..common.moe_layers import RoutedTokens
from ..common.routing import selection_overlap
from .measures.domain_means import numbers
from .measures.measure import Subject
from .results import Comparison, Figure


# Recorded tokens of a domain. 48 layers with 8 experts a token take 3 MiB for each domain.
MAX_TOKENS = 4096

FIGURES = (
    Figure(
        name="router_saturation",
        title="Router saturation",
        formula="mean_t |A_t ∩ B_t| / max(|A_t|, |B_t|)",
        meaning=(
            "The share of a token's experts that both checkpoints select, over the same tokens: 1 if they route "
            "alike. It compares experts by number, so it means something between checkpoints of one training run, or "
            "of runs that began with the same experts and routers."
        ),
        source="OLMoE (arXiv 2409.02060, section 5.1); the larger size below the line, where they differ, is ours",
    ),
    Figure(
        name="router_saturation_by_load",
        title="Router saturation that the loads alone give",
        formula="Σ_e a_e b_e / mean_t max(|A_t|, |B_t|)",
        meaning=(
            "What two routers with these loads would have in common if they knew nothing of each other: K / E if both "
            "are balanced. a_e and b_e are the shares of tokens that select expert e in either checkpoint."
        ),
        source="ours; exact where no slot is empty",
    ),
)


@dataclass(frozen=True, eq=False)
class RecordedSelections:
    """The experts that one checkpoint selected for the first tokens of each domain.

    Args:
        input_ids: the tokens [T].
        selected: experts [L, T, K]; E in an empty slot.
        layers: index in the model of each MoE layer [L].
        num_experts: E.
    """

    input_ids: torch.Tensor
    selected: torch.Tensor
    layers: tuple[int, ...]
    num_experts: int


class SelectionRecorder:
    """Records selections, to be fed as a measure is; its memory does not grow with the text.

    What it keeps stays on the device of the model until `selections`.
    """

    def __init__(self, subject: Subject, max_tokens: int = MAX_TOKENS):
        """Record the first `max_tokens` of each domain."""
        self.subject = subject
        self.max_tokens = max_tokens
        num_domains = len(subject.domains)
        self._input_ids: list[list[torch.Tensor]] = [[] for _ in range(num_domains)]
        self._selected: list[list[list[torch.Tensor]]] = [[[] for _ in range(num_domains)] for _ in subject.layers]

    @torch.no_grad()
    def update(self, number: int, tokens: RoutedTokens) -> None:
        """Add what MoE layer `number`, counted from 0, selected in a batch."""
        selected = self._selected[number][tokens.domain]
        num_missing = self.max_tokens - sum(len(batch) for batch in selected)
        if num_missing <= 0:
            return
        # Fresh copies: a slice would keep the whole batch.
        selected.append(tokens.selected[:num_missing].to(torch.int16, copy=True))
        if number == 0:
            self._input_ids[tokens.domain].append(tokens.input_ids.flatten()[:num_missing].clone())

    def selections(self) -> RecordedSelections:
        """Return what was recorded, domain by domain, on the CPU."""
        selected = [torch.cat([batch for domain in layer for batch in domain]).cpu() for layer in self._selected]
        return RecordedSelections(
            input_ids=torch.cat([batch for domain in self._input_ids for batch in domain]).cpu(),
            selected=torch.stack(selected),
            layers=tuple(layer.index for layer in self.subject.layers),
            num_experts=self.subject.num_experts,
        )


def differences(first: RecordedSelections, second: RecordedSelections) -> list[str]:
    """Return what two checkpoints differ in that keeps them from being compared; nothing if they can be."""
    is_alike = {
        "tokens": torch.equal(first.input_ids, second.input_ids),
        "MoE layers": first.layers == second.layers,
        "number of experts": first.num_experts == second.num_experts,
    }
    return [name for name, alike in is_alike.items() if not alike]


def compare(
    first_name: str, first: RecordedSelections, second_name: str, second: RecordedSelections
) -> Comparison | None:
    """Return how much of their routing two checkpoints have in common, or None if it cannot be compared.

    It can be where tokens, layers and the number of experts are the same; the experts of a token may differ in number.
    """
    if differences(first, second):
        return None
    num_experts = first.num_experts
    return Comparison(
        first=first_name,
        second=second_name,
        per_layer={
            "router_saturation": numbers(selection_overlap(first.selected, second.selected, num_experts)),
            "router_saturation_by_load": numbers(_overlap_by_load(first, second)),
        },
    )


def _overlap_by_load(first: RecordedSelections, second: RecordedSelections) -> torch.Tensor:
    """Return the overlap [L] of independent selections with the same loads."""
    sizes = [(each.selected < each.num_experts).sum(dim=-1) for each in (first, second)]  # [L, T]
    largest = torch.maximum(*sizes).double().mean(dim=-1)
    shares = [_selecting_shares(each) for each in (first, second)]
    # Two checkpoints that select nothing at all agree.
    return torch.where(largest > 0, (shares[0] * shares[1]).sum(dim=-1) / largest, 1.0)


def _selecting_shares(selections: RecordedSelections) -> torch.Tensor:
    """Return the share [L, E] of tokens that select each expert."""
    num_layers, num_tokens, _ = selections.selected.shape
    counts = torch.zeros(num_layers, selections.num_experts + 1, dtype=torch.float64)
    index = selections.selected.flatten(1).long()
    counts.scatter_add_(1, index, torch.ones(index.shape, dtype=torch.float64))
    return counts[:, :-1] / num_tokens
