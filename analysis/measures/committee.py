"""Whether the same few experts do the work in all domains.

Dimensions: L MoE layers, D domains with tokens, E experts to choose from.
"""

import math
from dataclasses import dataclass

import torch

from ...common.moe_layers import RoutedTokens
from ..results import Figure, MeasureResult
from .domain_means import DomainMeans, numbers, shares, weight_sums
from .measure import Measure, Subject


# Share of the domains whose top experts a standing expert is among: the threshold of COMMITTEEAUDIT.
PRESENCE = 0.8

PAPER = "COMMITTEEAUDIT (arXiv 2601.03425)"


class StandingCommittee(Measure):
    """The experts that are among the top ones in nearly all domains, and their share of the routing weight.

    The top experts of a domain are the K with the largest mean routing weight, K as the configuration has it; an
    expert without weight is never one. Standing experts are among the top ones in at least `PRESENCE` of the domains.
    The committee is the Pareto front of the standing experts: none has both a mean and a variance of the rank, over
    domains, that are as small, and one smaller. Where an expert is not among the top ones, its rank is K + 1.

    Tables: `presence` [L][E], the share of the domains where an expert is among the top ones; `committee` [L][E], 1
    for its members and 0 for the others.

    Source: COMMITTEEAUDIT (arXiv 2601.03425) and its published code. Ours: coverage is of the weight of all experts,
    not of the top ones; there may be no standing expert, where the code takes those present most often; all domains
    count, without the paper's filter by how specific the routing of a domain is.
    """

    name = "committee"
    figures = (
        Figure(
            name="top_overlap",
            title="Overlap of the domains' top experts",
            formula="mean_{d<d'} |A_d ∩ A_d'| / |A_d ∪ A_d'|",
            meaning=(
                "1 if all domains share their top experts, 0 if no two share one. A note says what random groups give."
            ),
            source=f"Jaccard similarity between domains: {PAPER}",
        ),
        Figure(
            name="gini",
            title="Gini coefficient of the routing weights",
            formula="mean_d Σ_e Σ_e' |q_de − q_de'| / (2 E)",
            meaning="How concentrated the weight of a domain is: 0 if even over the experts, 1 − 1/E if one has all.",
            source=f"Gini coefficient: {PAPER}",
        ),
        Figure(
            name="standing_experts",
            title="Standing experts",
            formula="|C|, C = {e : e ∈ A_d for at least 80 % of the domains d}",
            meaning=(
                "Experts that are among the top ones in nearly all domains: K if all domains have the same, 0 if none "
                "stands."
            ),
            source=f"candidates for the committee: {PAPER}",
        ),
        Figure(
            name="standing_coverage",
            title="Routing weight of the standing experts",
            formula="mean_d Σ_{e∈C} q_de",
            meaning="Their share of the routing weight; even routing gives |C| / E.",
            source=f"coverage: {PAPER}; of the candidates, ours",
        ),
        Figure(
            name="committee_size",
            title="Members of the standing committee",
            formula="|S|, S = {e ∈ C : no e' ∈ C with μ_e' ≤ μ_e and σ²_e' ≤ σ²_e, one of them smaller}",
            meaning=(
                "Standing experts with the best and steadiest ranks: 1 if one expert leads in every domain, more if "
                "the best are not the steadiest."
            ),
            source=f"Pareto front of mean and variance of the rank: {PAPER}",
        ),
        Figure(
            name="committee_coverage",
            title="Routing weight of the committee",
            formula="c = mean_d Σ_{e∈S} q_de",
            meaning="Its share of the routing weight; even routing gives |S| / E.",
            source=f"coverage: {PAPER}",
        ),
        Figure(
            name="committee_density",
            title="Weight of a member against others",
            formula="(c / |S|) / ((1 − c) / (E − |S|))",
            meaning="Mean weight of a member over that of an expert outside: 1 if routing is even.",
            source=f"relative impact density: {PAPER}",
        ),
    )

    def __init__(self, subject: Subject):
        super().__init__(subject)
        self._weights = DomainMeans(subject)

    @torch.no_grad()
    def update(self, number: int, tokens: RoutedTokens) -> None:
        self._weights.add(number, tokens, weight_sums(tokens, self.subject.num_experts))

    def result(self) -> MeasureResult:
        num_top = self.subject.layers[0].num_experts_per_tok
        audits = [audit(weights, num_top) for weights in self._weights.means()]
        return MeasureResult(
            per_layer={figure.name: [getattr(each, figure.name) for each in audits] for figure in self.figures},
            tables={
                "presence": numbers(torch.stack([each.presence for each in audits])),
                "committee": torch.stack([each.committee for each in audits]).int().tolist(),
            },
            notes=self._notes(num_top),
        )

    def _notes(self, num_top: int) -> list[str]:
        num_experts = self.subject.num_experts
        if len(self.subject.domains) < 2:
            return ["One domain: there is no other in which the same experts could stand."]
        if num_top >= num_experts:
            return [f"All {num_experts} experts are among the top {num_top} of every domain, whatever the routing."]
        return [
            f"Random groups of {num_top} of {num_experts} experts overlap by "
            f"{expected_overlap(num_top, num_experts):.3g} on average."
        ]


@dataclass(frozen=True, eq=False)
class Audit:
    """What [`StandingCommittee`] finds in one layer; figures are None where they have no meaning.

    Args:
        presence: [E].
        committee: whether each expert is a member [E].
    """

    presence: torch.Tensor
    committee: torch.Tensor
    gini: float | None
    top_overlap: float | None = None
    standing_experts: int | None = None
    standing_coverage: float | None = None
    committee_size: int | None = None
    committee_coverage: float | None = None
    committee_density: float | None = None


def audit(weights: torch.Tensor, num_top: int) -> Audit:
    """Return what the mean routing weights [D, E] of one layer say; domains of NaN or without weight are left out."""
    of_domain = shares(weights)
    of_domain = of_domain[~of_domain.isnan().any(dim=-1)]
    num_domains, num_experts = of_domain.shape
    ranks = top_ranks(of_domain, num_top)
    presence = (ranks <= num_top).double().mean(dim=0)
    gini = numbers(_gini(of_domain).mean())
    if num_domains < 2 or num_top >= num_experts:
        return Audit(presence, torch.zeros(num_experts, dtype=torch.bool), gini)
    # A little less, for shares such as 4/5 are not exact.
    is_standing = presence > PRESENCE - 1e-9
    committee = _pareto_front(ranks, is_standing)
    standing_coverage, coverage = (of_domain[:, who].sum(dim=-1).mean().item() for who in (is_standing, committee))
    return Audit(
        presence,
        committee,
        gini,
        top_overlap=_overlap(ranks <= num_top),
        standing_experts=int(is_standing.sum()),
        standing_coverage=standing_coverage,
        committee_size=int(committee.sum()),
        committee_coverage=coverage,
        committee_density=_density(of_domain.mean(dim=0), committee),
    )


def top_ranks(weights: torch.Tensor, num_top: int) -> torch.Tensor:
    """Return the ranks of experts by `weights` [D, E], from 1; `num_top` + 1 for those beyond it or without weight."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    ranks = order.argsort(dim=-1) + 1
    return torch.where(weights > 0, ranks, num_top + 1).clamp(max=num_top + 1)


def _pareto_front(ranks: torch.Tensor, is_standing: torch.Tensor) -> torch.Tensor:
    """Return which standing experts [E] no other equals in mean and variance of `ranks` [D, E] and beats in one."""
    # Multiples of mean and variance, in whole numbers: the order of the domains must not decide.
    means = ranks.sum(dim=0)
    variances = len(ranks) * ranks.square().sum(dim=0) - means.square()
    as_small = (means <= means[:, None]) & (variances <= variances[:, None])
    smaller = (means < means[:, None]) | (variances < variances[:, None])
    return is_standing & ~(as_small & smaller & is_standing).any(dim=-1)


def _overlap(is_top: torch.Tensor) -> float:
    """Return the Jaccard similarity of the groups `is_top` [D, E], averaged over pairs of domains."""
    is_top = is_top.double()
    common = is_top @ is_top.T  # [D, D]
    sizes = common.diagonal()
    jaccard = common / (sizes[:, None] + sizes - common)
    first, second = torch.triu_indices(*jaccard.shape, offset=1)
    return jaccard[first, second].mean().item()


def expected_overlap(num_top: int, num_experts: int) -> float:
    """Return the mean Jaccard similarity of two random groups of `num_top` out of `num_experts` experts."""
    total = math.comb(num_experts, num_top)
    similarity = 0.0
    for common in range(num_top + 1):
        ways = math.comb(num_top, common) * math.comb(num_experts - num_top, num_top - common)
        similarity += ways / total * common / (2 * num_top - common)
    return similarity


def _gini(distributions: torch.Tensor) -> torch.Tensor:
    """Return the Gini coefficient [D] over experts of `distributions` [D, E], which sum to one."""
    num_experts = distributions.shape[-1]
    places = torch.arange(1, num_experts + 1, dtype=distributions.dtype)
    return (distributions.sort(dim=-1).values * (2 * places - num_experts - 1)).sum(dim=-1) / num_experts


def _density(weights: torch.Tensor, committee: torch.Tensor) -> float | None:
    """Return the mean of members' `weights` [E] over that of the others; None without members or weight of others."""
    if not committee.any() or not weights[~committee].any():
        return None
    return (weights[committee].mean() / weights[~committee].mean()).item()
