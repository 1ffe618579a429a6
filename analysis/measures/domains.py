"""Which experts the tokens of a domain select more often than those of others.

Dimensions: L MoE layers, D domains, E experts to choose from.
"""

import math

import torch

from modeling_upcycled_moe import expert_counts

from ...common.moe_layers import RoutedTokens
from ..results import Figure, MeasureResult
from .domain_means import DomainMeans, num_domains_seen, numbers, shares
from .measure import Measure, Subject


class DomainSpecialization(Measure):
    """The share of a domain's tokens that select each expert.

    Tables: `specialization` [L][D][E], the share N_ed / N_d of the tokens of domain d that have expert e among their
    experts; `uniform` [L][D], what it would be if the same number of selections spread evenly, K / E unless slots are
    empty. None in a domain without tokens.

    Source: OLMoE (arXiv 2409.02060, section 5.3).
    """

    name = "domains"
    figures = (
        Figure(
            name="domain_specialization",
            title="Domain specialisation",
            formula="mean_e max_d s_de / u_d",
            meaning=(
                "How often an expert is selected in the domain that selects it most, against even spreading: 1 if all "
                "domains select the experts alike, however unevenly; min(D, E) if no two domains share one. Divided "
                "by D, it is how often the best guess from one selected expert names the domain."
            ),
            source="shares and even spreading: OLMoE (arXiv 2409.02060, section 5.3); the summary of a layer is ours",
        ),
        Figure(
            name="largest_specialization",
            title="Largest specialisation",
            formula="max_d max_e s_de / u_d",
            meaning=(
                "The most that a domain selects one expert, against even spreading: 1 if even, E / K if all its "
                "tokens select it. An expert that is busy in all domains makes it high too."
            ),
            source="shares and even spreading: OLMoE (arXiv 2409.02060, section 5.3); their maximum is ours",
        ),
    )

    def __init__(self, subject: Subject):
        super().__init__(subject)
        self._selections = DomainMeans(subject)

    @torch.no_grad()
    def update(self, number: int, tokens: RoutedTokens) -> None:
        self._selections.add(number, tokens, expert_counts(tokens.selected, self.subject.num_experts))

    def result(self) -> MeasureResult:
        selections = self._selections.means()  # [L, D, E]
        load = shares(selections)
        has_domains = num_domains_seen(load) > 1
        own = load.nan_to_num(0.0).amax(dim=1)  # [L, E]
        largest = self.subject.num_experts * own.amax(dim=-1)
        notes = []
        if len(self.subject.domains) < 2:
            notes.append("One domain: there is no other to specialise against.")
        return MeasureResult(
            per_layer={
                "domain_specialization": numbers(torch.where(has_domains, own.sum(dim=-1), math.nan)),
                "largest_specialization": numbers(torch.where(largest > 0, largest, math.nan)),
            },
            tables={"specialization": numbers(selections), "uniform": numbers(selections.mean(dim=-1))},
            notes=notes,
        )
