"""How often experts would be selected if tokens were independent of each other, the yardstick of other figures.

Dimensions: E experts to choose from.

If each of `n` tokens selects expert e with probability `a_e`, whatever the others do, its count is binomial. Counts of
different experts may depend on each other, as they do where every token has K experts; nothing here needs their joint
distribution.
"""

import torch


def count_probabilities(num_tokens: int, shares: torch.Tensor) -> torch.Tensor:
    """Return the probability [E, num_tokens + 1] of each count, for experts that a token selects with `shares` [E]."""
    count = torch.arange(num_tokens + 1, dtype=torch.float64)
    total = torch.tensor(num_tokens, dtype=torch.float64)
    log_ways = (total + 1).lgamma() - (count + 1).lgamma() - (total - count + 1).lgamma()
    # A sum of rounded shares may be a little above one.
    share = shares.double().clamp(max=1.0)[:, None]
    return (log_ways + torch.xlogy(count, share) + torch.xlogy(total - count, 1 - share)).exp()


def largest_counts_bound(num_tokens: int, shares: torch.Tensor, size: int) -> float:
    """Return what the `size` largest counts of `num_tokens` tokens sum to on average, at most.

    For every threshold t the sum is at most `size * t + Σ_e max(c_e - t, 0)`, and the mean of that follows from each
    expert's own distribution; the least of these means is returned. It is exact if `size` is E or more.

    Args:
        shares: probability of a token to select each expert [E].

    Source: ours.
    """
    at_least = count_probabilities(num_tokens, shares).flip(-1).cumsum(dim=-1).flip(-1)  # P(c_e >= t) [E, n + 1]
    excess = at_least.flip(-1).cumsum(dim=-1).flip(-1) - at_least  # mean of max(c_e - t, 0)
    threshold = torch.arange(num_tokens + 1, dtype=torch.float64)
    return (size * threshold + excess.sum(dim=0)).min().item()
