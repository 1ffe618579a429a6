"""Routers, experts and router losses written from their formulas, one token and one expert at a time.

Slow on purpose: these are what the fast code is compared with, so they share none of it.
"""

import math

import torch
from torch import Tensor


def linear_scores(x: Tensor, weight: Tensor) -> Tensor:
    """Return `s_e = w_e · x` [E]."""
    return torch.stack([(row * x).sum() for row in weight])


def mixture_scores(x: Tensor, queries: Tensor, keys: Tensor, num_experts: int, pooling: str) -> Tensor:
    """Return `s_e = max over e's keys of pool_r (W_r x) · k` [E], for `queries` [R, D, H] and `keys` [J, D]."""
    keys_per_expert = len(keys) // num_experts
    scores = []
    for expert in range(num_experts):
        key_scores = []
        for key in keys[expert * keys_per_expert : (expert + 1) * keys_per_expert]:
            votes = [(query @ x) @ key for query in queries]
            key_scores.append(sum(votes) if pooling == "sum" else torch.stack(votes).max())
        scores.append(torch.stack(key_scores).max())
    return torch.stack(scores)


def mlp_router_scores(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return `s = W_2 gelu(W_1 x)` [E], with the exact GELU."""
    hidden = torch.stack([(row * x).sum() for row in up])
    return linear_scores(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), down)


def grouped_average_scores(x: Tensor, num_experts: int) -> Tensor:
    """Return the mean of each of `num_experts` equal parts of the token [E]."""
    part = len(x) // num_experts
    return torch.stack([sum(x[expert * part : (expert + 1) * part]) / part for expert in range(num_experts)])


def softmax(scores: Tensor) -> Tensor:
    exponentials = [torch.exp(score - scores.max()) for score in scores]
    return torch.stack(exponentials) / sum(exponentials)


def groups_of(num_experts: int, config) -> list[range]:
    """Return the experts of each group; all in one if the selection has none."""
    size = num_experts // (config.num_expert_groups or 1)
    return [range(first, first + size) for first in range(0, num_experts, size)]


def routing_scores(logits: Tensor, config) -> Tensor:
    """Return what each expert is selected and weighted by [E]."""
    if config.router_score_function == "sigmoid":
        return torch.stack([1 / (1 + torch.exp(-logit)) for logit in logits])
    if config.router_selection == "prototype_top_k":
        groups = groups_of(len(logits), config)
        return torch.cat([softmax(logits[list(group)]) / len(groups) for group in groups])
    return softmax(logits)


def select(logits: Tensor, config, bias: Tensor | None = None) -> list[tuple[int, Tensor]]:
    """Return the experts of a token and their weights, in the order of its slots."""
    scores = routing_scores(logits, config)
    choice = scores if bias is None else scores + bias
    groups = groups_of(len(scores), config)
    chosen = []
    for group in groups:
        best = sorted(group, key=lambda expert: -choice[expert].item())
        chosen.append(best[: config.num_experts_per_tok // len(groups)])
    if config.router_selection == "top_p":
        kept, total = [], 0.0
        for expert in chosen[0]:
            if total < config.router_top_p:
                kept.append(expert)
            total += scores[expert].item()
        chosen = [kept]
    if config.shared_expert_gating == "complement":
        values = scores[chosen[0]]
        return list(zip(chosen[0], softmax(values) * values.max(), strict=True))
    if not config.norm_topk_prob:
        return [(expert, scores[expert]) for experts in chosen for expert in experts]
    if config.router_selection != "prototype_top_k":
        chosen = [[expert for experts in chosen for expert in experts]]
    return [
        (expert, scores[expert] / sum(scores[other] for other in experts) / len(chosen))
        for experts in chosen
        for expert in experts
    ]


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    activation = gate @ x
    return down @ (activation * torch.sigmoid(activation) * (up @ x))


def router_scores(gate, x: Tensor, config) -> Tensor:
    """Return the scores [E] of the router `gate`, reading nothing but its parameters."""
    if config.router_type == "linear":
        return linear_scores(x, gate.weight)
    if config.router_type == "mlp":
        return mlp_router_scores(x, gate.up_weight, gate.down_weight)
    if config.router_type == "grouped_average":
        return grouped_average_scores(x, config.num_routed_experts)
    return mixture_scores(x, gate.query_weight, gate.keys, config.num_routed_experts, config.router_pooling)


def expert_output(block, x: Tensor, expert: int, config) -> Tensor:
    """Return the output [H] of one routed expert, with computation or without."""
    if expert < config.num_experts:
        width = config.moe_intermediate_size
        gate_up = block.experts.gate_up_proj[expert]
        return mlp(x, gate_up[:width], gate_up[width:], block.experts.down_proj[expert])
    expert -= config.num_experts
    if expert < config.num_zero_experts:
        return torch.zeros_like(x)
    expert -= config.num_zero_experts
    if expert < config.num_copy_experts:
        return x
    expert -= config.num_copy_experts
    mixing = softmax(block.constant_experts.weight[expert] @ x)
    return mixing[0] * x + mixing[1] * block.constant_experts.vectors[expert]


def moe_block(block, x: Tensor, config) -> tuple[Tensor, Tensor]:
    """Return output [H] and scores [E] of `block` for one token, reading nothing but its parameters."""
    scores = router_scores(block.gate, x, config)
    output = torch.zeros_like(x)
    bias = block.gate.selector.e_score_correction_bias if config.use_router_bias else None
    for expert, weight in select(scores, config, bias):
        output = output + weight * expert_output(block, x, expert, config)
    if config.shared_expert_intermediate_size:
        shared = block.shared_expert
        weight = {
            "sigmoid": lambda: torch.sigmoid(block.shared_expert_gate.weight[0] @ x),
            "plain": lambda: 1.0,
            "complement": lambda: 1 - softmax(scores).max(),
        }[config.shared_expert_gating]()
        output = output + weight * mlp(x, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
    return output, scores


def balance_loss(logits: Tensor, config, is_token: list[bool]) -> Tensor:
    """Return `E Σ_e f_e P_e` of one layer, for `logits` [T, E]; only tokens for which `is_token` count."""
    rows = [row for row, counts in zip(logits, is_token, strict=True) if counts]
    num_experts = logits.shape[-1]
    loss = 0.0
    for expert in range(num_experts):
        times_selected = sum(expert in [e for e, _ in select(row, config)] for row in rows)
        scores = [routing_scores(row, config) for row in rows]
        mean_probability = sum(score[expert] / score.sum() for score in scores) / len(rows)
        loss = loss + times_selected / len(rows) * mean_probability
    return num_experts * loss


def z_loss(logits: Tensor, is_token: list[bool]) -> Tensor:
    """Return the mean of `(log Σ_e exp s_e)²` of one layer over the tokens that count."""
    rows = [row for row, counts in zip(logits, is_token, strict=True) if counts]
    return sum(torch.log(sum(torch.exp(score) for score in row)) ** 2 for row in rows) / len(rows)


def language_modeling_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of each next token in `labels` [B, S], of which those with -100 do not count."""
    losses = []
    for row, targets in zip(logits, labels, strict=True):
        for position, target in enumerate(targets[1:].tolist()):
            if target != -100:
                losses.append(torch.logsumexp(row[position], dim=-1) - row[position, target])
    assert not math.isnan(sum(losses).item())
    return sum(losses) / len(losses)
