"""Selection: from router logits to the experts of each token and their weights.

Dimensions: T tokens, E experts that a router chooses from, K slots of a token, G groups of neighbouring experts.

A way of selection is a function from scores [T, E], or what has their order, to the index [T, K] of each token's
experts, and an entry in `SELECTIONS`. The index E says that a slot is empty. Weights are computed from the logarithms
of the scores, which neither overflow nor vanish, whatever the size of the logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


def log_scores(router_logits: torch.Tensor, config) -> torch.Tensor:
    """Return the logarithms [T, E], in float32, of the scores by which experts are selected and weighted.

    Scores sum to one for `softmax`; each is between zero and one for `sigmoid`. With `prototype_top_k` every group has
    a softmax of its own, which sums to 1 / G.

    Source: sigmoid: DeepSeek-V3 (arXiv 2412.19437); groups: M6-T (arXiv 2105.15082), its expert prototyping.
    """
    if config.router_score_function == "sigmoid":
        return F.logsigmoid(router_logits.float())
    if config.router_selection != "prototype_top_k":
        return F.log_softmax(router_logits, dim=-1, dtype=torch.float)
    groups = config.num_expert_groups
    grouped = F.log_softmax(router_logits.unflatten(-1, (groups, -1)), dim=-1, dtype=torch.float)
    return (grouped - math.log(groups)).flatten(-2)


def routing_log_probabilities(router_logits: torch.Tensor, config) -> torch.Tensor:
    """Return the logarithms of the scores [T, E] scaled to sum to one, which losses and statistics take."""
    scores = log_scores(router_logits, config)
    return F.log_softmax(scores, dim=-1) if config.router_score_function == "sigmoid" else scores


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
    best = best.exp()
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


@dataclass(frozen=True)
class Selection:
    """A way of selection, and what goes with it.

    Args:
        select: from log-scores [T, E], or what has their order, to the index [T, K].
        is_grouped: whether it selects from `num_expert_groups` groups of equal size.
        leaves_empty_slots: whether a token may get fewer experts than it has slots.
        compares_within_token: whether it only compares scores of a token, so that a bias can be added to them.
        takes_free_experts: whether it can select experts without computation too.
        in_evaluation: name of the selection that stands for it in evaluation mode; itself if None.
    """

    select: Callable[[torch.Tensor, object], torch.Tensor]
    is_grouped: bool = False
    leaves_empty_slots: bool = False
    compares_within_token: bool = True
    takes_free_experts: bool = True
    in_evaluation: str | None = None


SELECTIONS = {
    "top_k": Selection(select_top_k),
    "grouped_top_k": Selection(select_grouped_top_k, is_grouped=True, takes_free_experts=False),
    "prototype_top_k": Selection(select_grouped_top_k, is_grouped=True, takes_free_experts=False),
    "top_p": Selection(select_top_p, leaves_empty_slots=True, compares_within_token=False),
    # By the token alone in evaluation, so that what is generated does not depend on what comes after it.
    "expert_choice": Selection(
        select_expert_choice,
        leaves_empty_slots=True,
        compares_within_token=False,
        takes_free_experts=False,
        in_evaluation="top_k",
    ),
}


def expert_weights(scores: torch.Tensor, index: torch.Tensor, config) -> torch.Tensor:
    """Return the weights [T, K] of the experts `index` [T, K] with log-scores [T, E]; zero in empty slots.

    These are the scores, scaled to sum to one with `norm_topk_prob` (to 1 / G in each group for `prototype_top_k`).
    Beside a shared expert with `complement` gating they are `max(v) softmax(v)` of the selected scores v, and the
    shared expert has the rest, `1 - max(v)`.

    Source: complement: XFT (arXiv 2404.15247), its routing weight normalisation.
    """
    is_filled = index < scores.shape[-1]
    # Far below any score, and finite: a token that no expert chose has nothing else.
    lowest = -1e30
    selected = F.pad(scores, (0, 1), value=lowest).gather(-1, index)
    if config.shared_expert_gating == "complement":
        values = selected.exp()
        return values.amax(dim=-1, keepdim=True) * F.softmax(values, dim=-1)
    if not config.norm_topk_prob:
        return selected.exp()
    if config.router_selection == "prototype_top_k":
        groups = config.num_expert_groups
        return (F.softmax(selected.unflatten(-1, (groups, -1)), dim=-1) / groups).flatten(-2)
    return F.softmax(selected, dim=-1) * is_filled


class ExpertSelector(nn.Module):
    """Select the experts of each token by its router logits.

    A module without parameters, whose output is recorded: parallel plans and adapters change what the router around
    it returns. Its bias, if it has one, is no parameter: `update_bias` moves it.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        bias = torch.zeros(config.num_routed_experts, dtype=torch.float32) if config.use_router_bias else None
        # Named as in stock DeepSeek-V3 models.
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights [T, K], in float32, and index [T, K] for logits [T, E]; 0 and E in an empty slot."""
        scores = log_scores(router_logits, self.config)
        selection = SELECTIONS[self.config.router_selection]
        if selection.in_evaluation is not None and not self.training:
            selection = SELECTIONS[selection.in_evaluation]
        if self.e_score_correction_bias is not None:
            choice = scores.detach().exp() + self.e_score_correction_bias
        elif selection.compares_within_token:
            # In the order of the scores, and without the ties that rounding makes of large ones.
            choice = router_logits.detach().float()
        else:
            choice = scores.detach()
        index = selection.select(choice, self.config)
        return expert_weights(scores, index, self.config), index

    @torch.no_grad()
    def update_bias(self, loads: torch.Tensor) -> None:
        """Move the bias of every expert by `router_bias_update_rate` towards the mean of `loads` [E].

        Source: Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), algorithm 1.
        """
        loads = loads.to(self.e_score_correction_bias)
        self.e_score_correction_bias += self.config.router_bias_update_rate * torch.sign(loads.mean() - loads)

    def _apply(self, fn, recurse=True):
        """Convert as any module, but leave the bias in float32: in bfloat16 steps of a thousandth would end at 0.5."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after.dtype != torch.float32:
            has_values = before.device.type != "meta" and after.device.type != "meta"
            self.e_score_correction_bias = before.to(after.device) if has_values else after.float()
        return self


def sum_dtype(device: torch.device | str) -> torch.dtype:
    """Return the type for sums over tokens: float32 loses counts above 2^24, but MPS has nothing better."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def expert_counts(
    selected_experts: torch.Tensor, num_experts: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return how often each expert is selected [E], in the type of `sum_dtype`.

    Args:
        selected_experts: index [T, K]; E in an empty slot.
        weights: 1 for tokens that count and 0 for padding [T]; all count by default.
    """
    device = selected_experts.device
    counted = torch.ones(selected_experts.shape[0], dtype=sum_dtype(device), device=device)
    if weights is not None:
        counted = weights.to(counted)
    counts = counted.new_zeros(num_experts + 1)
    return counts.index_add(0, selected_experts.flatten(), counted.repeat_interleave(selected_experts.shape[1]))[:-1]


__all__ = [
    "SELECTIONS",
    "ExpertSelector",
    "Selection",
    "expert_counts",
    "expert_weights",
    "log_scores",
    "routing_log_probabilities",
    "sum_dtype",
]
