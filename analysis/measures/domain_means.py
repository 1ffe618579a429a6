"""Means over the tokens of each domain, and what is computed from them.

Dimensions: L MoE layers, D domains, E experts to choose from, T tokens, K slots of a token.

A mean over no token is NaN here, and None in a result, for JSON has no NaN.
"""

from typing import Any

import torch

from modeling_upcycled_moe.selection_upcycled_moe import sum_dtype

from ...common.moe_layers import RoutedTokens
from .measure import Subject


class DomainMeans:
    """Means [L, D, E] over the tokens of each domain, for every layer.

    Sums stay on the device of the model, and nothing is read back before `means`.

    Args:
        size: numbers that a token has; by default one for each expert, E.
    """

    def __init__(self, subject: Subject, size: int | None = None):
        shape = len(subject.layers), len(subject.domains), subject.num_experts if size is None else size
        self.sums = torch.zeros(shape, dtype=sum_dtype(subject.device), device=subject.device)  # [L, D, E]
        self.num_tokens = torch.zeros(shape[:2], dtype=torch.float64)  # [L, D]

    def add(self, number: int, tokens: RoutedTokens, sums: torch.Tensor) -> None:
        """Add the `sums` [E] over `tokens`, which layer `number` routed."""
        self.sums[number, tokens.domain] += sums.to(self.sums)
        self.num_tokens[number, tokens.domain] += len(tokens.selected)

    def means(self) -> torch.Tensor:
        """Return the means [L, D, E], in float64 on the CPU."""
        return self.sums.cpu().double() / self.num_tokens[:, :, None]


def weight_sums(tokens: RoutedTokens, num_experts: int) -> torch.Tensor:
    """Return the sum [E] over `tokens` of each expert's weight, which is zero where it is not selected."""
    return _sums_by_expert(tokens, tokens.weights.to(sum_dtype(tokens.weights.device)), num_experts)


def weight_square_sums(tokens: RoutedTokens, num_experts: int) -> torch.Tensor:
    """Return the sum [E] over `tokens` of the square of each expert's weight."""
    return _sums_by_expert(tokens, tokens.weights.to(sum_dtype(tokens.weights.device)).square(), num_experts)


def _sums_by_expert(tokens: RoutedTokens, values: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return the sum [E] of the `values` [T, K] of the slots that selected each expert."""
    sums = values.new_zeros(num_experts + 1).index_add(0, tokens.selected.flatten(), values.flatten())
    return sums[:-1]


def shares(values: torch.Tensor) -> torch.Tensor:
    """Return `values` [..., E] scaled to sum to one over experts; NaN where they sum to zero."""
    return values / values.sum(dim=-1, keepdim=True)


def mean_entropy(distributions: torch.Tensor) -> torch.Tensor:
    """Return the entropy of `distributions` [..., D, E] over experts, averaged over domains with tokens, in nats."""
    return torch.special.entr(distributions).sum(dim=-1).nanmean(dim=-1)


def num_domains_seen(values: torch.Tensor) -> torch.Tensor:
    """Return how many domains of `values` [L, D, E] are without NaN [L]."""
    return (~values.isnan().any(dim=-1)).sum(dim=-1)


def numbers(values: torch.Tensor) -> Any:
    """Return `values` as nested lists of numbers, with None for NaN."""

    def listed(value):
        if isinstance(value, list):
            return [listed(each) for each in value]
        return None if value != value else value

    return listed(values.tolist())
