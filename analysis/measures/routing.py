"""How evenly and how surely the routers choose.

Dimensions: L MoE layers, D domains, E experts to choose from.
"""

import torch

from modeling_upcycled_moe import expert_counts

from ...common.moe_layers import RoutedTokens
from ...common.routing import RouterStatistics
from ..results import Figure, MeasureResult
from .domain_means import DomainMeans, numbers, shares
from .measure import Measure, Subject


class Routing(Measure):
    """The figures of `common/routing.py`, over the tokens of all domains together.

    Tables: `load` [L][E], the share of all selections that went to each expert; `domain_load` [L][D][E], the same of
    the selections of each domain.
    """

    name = "routing"
    figures = (
        Figure(
            name="entropy",
            title="Entropy of the routing probabilities",
            formula="mean_t −Σ_e p_te ln p_te",
            meaning=(
                "How undecided the router is about a token, in nats: 0 if it is sure, ln E if it prefers no expert."
            ),
            source="Shannon entropy of the router's scores, scaled to sum to one",
        ),
        Figure(
            name="load_entropy",
            title="Entropy of the load",
            formula="−Σ_e f_e ln f_e",
            meaning="How evenly the selections spread, in nats: ln E if every expert gets as many, 0 if one gets all.",
            source="Shannon entropy of the load",
        ),
        Figure(
            name="max_violation",
            title="Largest load violation",
            formula="E max_e f_e − 1",
            meaning="How far the busiest expert is above the mean load: 0 if balanced, 1 at twice the mean.",
            source="MaxVio of Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664)",
        ),
        Figure(
            name="dead_experts",
            title="Experts that no token selected",
            formula="|{e : f_e = 0}|",
            meaning="0 is healthy. Of few tokens, experts that are seldom selected count too.",
            source="ours",
        ),
        Figure(
            name="experts_per_token",
            title="Experts per token",
            formula="Σ_t |S_t| / T",
            meaning="How many experts a token got: K, or fewer where the selection leaves slots empty.",
            source="ours",
        ),
        Figure(
            name="logit_std",
            title="Spread of the router logits",
            formula="√(mean_t var_e z_te)",
            meaning=(
                "Standard deviation of a token's logits over experts: near 0 its scores are even; at several, one "
                "expert has nearly all."
            ),
            source="ours",
        ),
    )

    def __init__(self, subject: Subject):
        super().__init__(subject)
        self._statistics = RouterStatistics(len(subject.layers), subject.num_experts, subject.device)
        self._selections = DomainMeans(subject)

    @torch.no_grad()
    def update(self, number: int, tokens: RoutedTokens) -> None:
        self._statistics.update_layer(number, tokens.router_logits, tokens.selected, tokens.log_probabilities)
        self._selections.add(number, tokens, expert_counts(tokens.selected, self.subject.num_experts))

    def result(self) -> MeasureResult:
        metrics = self._statistics.metrics()
        return MeasureResult(
            per_layer={figure.name: [layer[figure.name] for layer in metrics] for figure in self.figures},
            tables={
                "load": [layer["load"] for layer in metrics],
                "domain_load": numbers(shares(self._selections.means())),
            },
        )
