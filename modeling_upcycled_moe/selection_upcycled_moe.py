"""Selection: from router logits to the experts of each token and their weights.

Dimensions: T tokens, E experts that a router chooses from, K slots of a token, G groups of neighbouring experts.

A way of selection is a function from scores [T, E] to the index [T, K] of each token's experts, and an entry in
`SELECTIONS`. The index E says that a slot is empty.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def routing_scores(router_logits: torch.Tensor, config) -> torch.Tensor:
    """Return the scores [T, E], in float32, by which experts are selected and weighted.

    They sum to one for `softmax`; each is between zero and one for `sigmoid`. With `prototype_top_k` every group has a
    softmax of its own, which sums to 1 / G.

    Source: sigmoid: DeepSeek-V3 (arXiv 2412.19437); groups: M6-T (arXiv 2105.15082), its expert prototyping.
    """
    if config.router_score_function == "sigmoid":
        return router_logits.float().sigmoid()
    if config.router_selection != "prototype_top_k":
        return F.softmax(router_logits, dim=-1, dtype=torch.float)
    groups = config.num_expert_groups
    return (F.softmax(router_logits.unflatten(-1, (groups, -1)), dim=-1, dtype=torch.float) / groups).flatten(-2)


def routing_probabilities(router_logits: torch.Tensor, config) -> torch.Tensor:
    """Return the scores [T, E] scaled to sum to one, which losses and statistics take for probabilities."""
    scores = routing_scores(router_logits, config)
    return scores / scores.sum(dim=-1, keepdim=True) if config.router_score_function == "sigmoid" else scores


def select_top_k(scores: torch.Tensor, config) -> torch.Tensor:
    """Select the `num_experts_per_tok` best experts, the best first."""
    return torch.topk(scores, config.num_experts_per_tok, dim=-1).indices


def select_grouped_top_k(scores: torch.Tensor, config) -> torch.Tensor:
    """Select `num_experts_per_tok / G` experts from each group, group by group.

    Source: Pangu Pro MoE (arXiv 2505.21411), its mixture of grouped experts; M6-T (arXiv 2105.15082).
    """
    groups = config.num_expert_groups
    grouped = scores.unflatten(-1, (groups, -1))  # [T, G, E / G]
    best = torch.topk(grouped, config.num_experts_per_tok // groups, dim=-1).indices
    first = torch.arange(0, scores.shape[-1], grouped.shape[-1], device=scores.device)
    return (best + first[:, None]).flatten(-2)


def select_top_p(scores: torch.Tensor, config) -> torch.Tensor:
    """Select the best experts until their scores sum to `router_top_p`, at least one, at most `num_experts_per_tok`.

    Source: Harder Tasks Need More Experts (arXiv 2403.07652), its dynamic routing; the upper limit is ours.
    """
    best, index = torch.topk(scores, config.num_experts_per_tok, dim=-1)
    sum_before = best.cumsum(dim=-1) - best
    return index.masked_fill(sum_before >= config.router_top_p, scores.shape[-1])


def select_expert_choice(scores: torch.Tensor, config) -> torch.Tensor:
    """Let every expert select its `T * num_experts_per_tok / E` best tokens (rounded up); K is E.

    A token may get any number of experts, none too. Which ones depends on all tokens of the batch.

    Source: Expert Choice (arXiv 2202.09368).
    """
    num_tokens, num_experts = scores.shape
    capacity = min(-(-num_tokens * config.num_experts_per_tok // num_experts), num_tokens)
    chosen = torch.topk(scores, capacity, dim=0).indices  # [capacity, E]
    is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(0, chosen, True)
    experts = torch.arange(num_experts, device=scores.device).expand_as(scores)
    return experts.masked_fill(~is_chosen, num_experts)


SELECTIONS: dict[str, Callable[[torch.Tensor, object], torch.Tensor]] = {
    "top_k": select_top_k,
    "grouped_top_k": select_grouped_top_k,
    "prototype_top_k": select_grouped_top_k,
    "top_p": select_top_p,
    "expert_choice": select_expert_choice,
}


def expert_weights(scores: torch.Tensor, index: torch.Tensor, config) -> torch.Tensor:
    """Return the weights [T, K] of the selected experts, zero in empty slots.

    These are the scores, scaled to sum to one with `norm_topk_prob` (to 1 / G in each group for `prototype_top_k`).
    Beside a shared expert with `complement` gating they are `max(v) softmax(v)` of the selected scores v, and the
    shared expert has the rest, `1 - max(v)`.

    Source: complement: XFT (arXiv 2404.15247), its routing weight normalisation.
    """
    weights = F.pad(scores, (0, 1)).gather(-1, index)
    if config.shared_expert_gating == "complement":
        return weights.amax(dim=-1, keepdim=True) * F.softmax(weights, dim=-1)
    if not config.norm_topk_prob:
        return weights
    if config.router_selection == "prototype_top_k":
        grouped = weights.unflatten(-1, (config.num_expert_groups, -1))
        return (grouped / (grouped.sum(dim=-1, keepdim=True) * config.num_expert_groups)).flatten(-2)
    # A token that no expert chose has no weight to scale.
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


__all__ = ["SELECTIONS", "expert_weights", "routing_probabilities", "routing_scores"]
