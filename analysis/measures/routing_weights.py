"""How much weight each domain gives to each expert.

Dimensions: L MoE layers, D domains, E experts to choose from.
"""

import math

import torch

from ...common.moe_layers import RoutedTokens
from ..results import Figure, MeasureResult
from .domain_means import (
    DomainMeans,
    mean_entropy,
    num_domains_seen,
    numbers,
    shares,
    weight_square_sums,
    weight_sums,
)
from .measure import Measure, Subject


class RoutingWeights(Measure):
    """The mean routing weight of each expert over the tokens of each domain.

    Tables: `weights` [L][D][E], what the experts' outputs are multiplied with, zero where an expert is not selected;
    `probabilities` [L][D][E], the scores of all experts before selection. None in a domain without tokens.
    """

    name = "routing_weights"
    figures = (
        Figure(
            name="routing_diversity",
            title="Routing diversity",
            formula="mean_d std_e(w_de) / mean_e(w_de)",
            meaning=(
                "How unevenly a domain weights the experts: 0 if all alike, √(E−1) if one has all. Collapse onto the "
                "same experts in all domains makes it high too, so read it with the divergence between domains."
            ),
            source=(
                "Router Upcycling (arXiv 2509.00679, section 5.3) calls a more uneven distribution of routing weights "
                "more diverse, without a formula; the coefficient of variation is our reading"
            ),
        ),
        Figure(
            name="weight_range",
            title="Range of the routing weights",
            formula="mean_d (max_e q_de − min_e q_de)",
            meaning="Between the most and the least weighted expert of a domain: 0 if all alike, 1 if one has all.",
            source=(
                "the ranges that Router Upcycling quotes (arXiv 2509.00679, section 5.3); scaling each domain to sum "
                "to one is ours"
            ),
        ),
        Figure(
            name="domain_divergence",
            title="Divergence between domains",
            formula="(H(mean_d q_d) − mean_d H(q_d)) / ln min(D, E)",
            meaning=(
                "How much the weighting of experts differs between domains: 0 if all weight them alike, 1 if no two "
                "share one. High: experts specialise by domain; low beside a high diversity: collapse. It is what an "
                "expert, drawn by weight, tells about the domain."
            ),
            source="generalised Jensen–Shannon divergence (Lin 1991), domains weighted equally; its use here is ours",
        ),
        Figure(
            name="domain_divergence_by_load",
            title="Divergence between domains that the loads alone give",
            formula="(D − 1) Σ_d (1 / T_d) Σ_e v_e / q_e / (2 D² ln min(D, E)), v_e = mean_t (w_te − q_e s_t)² / s̄²",
            meaning=(
                "What chance gives if all domains route alike and tokens are independent of each other, though text "
                "is not: only a divergence several times as large is one between domains."
            ),
            source="ours; the least order in 1 / T_d",
        ),
    )

    def __init__(self, subject: Subject):
        super().__init__(subject)
        self._weights = DomainMeans(subject)
        self._squares = DomainMeans(subject)
        self._total_squares = DomainMeans(subject, size=1)
        self._probabilities = DomainMeans(subject)

    @torch.no_grad()
    def update(self, number: int, tokens: RoutedTokens) -> None:
        self._weights.add(number, tokens, weight_sums(tokens, self.subject.num_experts))
        self._squares.add(number, tokens, weight_square_sums(tokens, self.subject.num_experts))
        totals = tokens.weights.sum(dim=-1, dtype=self._total_squares.sums.dtype)  # [T]
        self._total_squares.add(number, tokens, totals.square().sum(dim=0, keepdim=True))
        sums = tokens.log_probabilities.exp().sum(dim=0, dtype=self._probabilities.sums.dtype)
        self._probabilities.add(number, tokens, sums)

    def result(self) -> MeasureResult:
        weights = self._weights.means()  # [L, D, E]
        of_domain = shares(weights)
        notes = []
        if len(self.subject.domains) < 2:
            notes.append("One domain: there is no divergence between domains.")
        return MeasureResult(
            per_layer={
                "routing_diversity": numbers(routing_diversity(weights)),
                "weight_range": numbers((of_domain.amax(dim=-1) - of_domain.amin(dim=-1)).nanmean(dim=-1)),
                "domain_divergence": numbers(domain_divergence(of_domain)),
                "domain_divergence_by_load": numbers(
                    divergence_by_load(
                        weights, self._squares.means(), self._total_squares.means()[..., 0], self._weights.num_tokens
                    )
                ),
            },
            tables={"weights": numbers(weights), "probabilities": numbers(self._probabilities.means())},
            notes=notes,
        )


def routing_diversity(weights: torch.Tensor) -> torch.Tensor:
    """Return the coefficient of variation over experts of `weights` [L, D, E], averaged over domains [L]."""
    return (weights.std(dim=-1, correction=0) / weights.mean(dim=-1)).nanmean(dim=-1)


def domain_divergence(distributions: torch.Tensor) -> torch.Tensor:
    """Return the Jensen–Shannon divergence [L] between the domains of `distributions` [L, D, E], from 0 to 1.

    Domains of NaN are left out; it is NaN where fewer than two remain.
    """
    mixture = distributions.nanmean(dim=-2)
    divergence = torch.special.entr(mixture).sum(dim=-1) - mean_entropy(distributions)
    largest = num_domains_seen(distributions).clamp(max=distributions.shape[-1]).log()
    # Rounding can leave a little less than zero.
    return torch.where(largest > 0, divergence.clamp(min=0) / largest, math.nan)


def divergence_by_load(
    weights: torch.Tensor, squares: torch.Tensor, total_squares: torch.Tensor, num_tokens: torch.Tensor
) -> torch.Tensor:
    """Return the divergence [L] that domains with the same routing have by chance, from 0 to 1.

    Near its least value the divergence is half the mean over domains of Σ_e (q_de − q_e)² / q_e, and the variance of
    q_de is that of a token, v_e, over the number of tokens. From Σ_e q_e = 1 follows Σ_e v_e / q_e, where s_t is the
    weight of all experts of a token, without products of different experts: (Σ_e ⟨w_e²⟩ / q_e − ⟨s²⟩) / s̄².

    Args:
        weights: mean weight of each expert [L, D, E]; domains without any are left out.
        squares: mean of its square [L, D, E].
        total_squares: mean of the square of a token's weights together [L, D].
        num_tokens: [L, D].
    """
    num_experts = weights.shape[-1]
    has_weight = weights.sum(dim=-1) > 0  # [L, D]
    num_domains = has_weight.sum(dim=-1)  # [L]

    def mean_of_domains(values: torch.Tensor) -> torch.Tensor:
        return torch.where(has_weight[..., None], values, 0.0).sum(dim=1) / num_domains[:, None]

    mean = mean_of_domains(weights)  # [L, E]
    total = mean.sum(dim=-1, keepdim=True)
    ratios = torch.where(mean > 0, mean_of_domains(squares) * total / mean, 0.0).sum(dim=-1)  # [L]
    variance = (ratios - mean_of_domains(total_squares[..., None])[:, 0]) / total[:, 0].square()
    tokens = torch.where(has_weight, 1 / num_tokens, 0.0).sum(dim=-1)  # [L]
    largest = num_domains.clamp(max=num_experts).log()
    chance = (num_domains - 1) * tokens * variance / (2 * num_domains.square() * largest)
    return torch.where(largest > 0, chance.clamp(0.0, 1.0), math.nan)
