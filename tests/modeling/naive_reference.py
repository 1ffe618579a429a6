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


def softmax(scores: Tensor) -> Tensor:
    exponentials = [torch.exp(score - scores.max()) for score in scores]
    return torch.stack(exponentials) / sum(exponentials)


def select(scores: Tensor, top_k: int, norm_topk_prob: bool) -> list[tuple[int, Tensor]]:
    """Return the `top_k` most probable experts and their weights, the best first."""
    probabilities = softmax(scores)
    chosen = sorted(range(len(scores)), key=lambda expert: -probabilities[expert].item())[:top_k]
    total = sum(probabilities[expert] for expert in chosen) if norm_topk_prob else 1.0
    return [(expert, probabilities[expert] / total) for expert in chosen]


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    activation = gate @ x
    return down @ (activation * torch.sigmoid(activation) * (up @ x))


def moe_block(block, x: Tensor, config) -> tuple[Tensor, Tensor]:
    """Return output [H] and scores [E] of `block` for one token, reading nothing but its parameters."""
    if config.router_type == "linear":
        scores = linear_scores(x, block.gate.weight)
    else:
        gate = block.gate
        scores = mixture_scores(x, gate.query_weight, gate.keys, config.num_experts, config.router_pooling)
    output = torch.zeros_like(x)
    for expert, weight in select(scores, config.num_experts_per_tok, config.norm_topk_prob):
        width = config.moe_intermediate_size
        gate_up = block.experts.gate_up_proj[expert]
        output = output + weight * mlp(x, gate_up[:width], gate_up[width:], block.experts.down_proj[expert])
    if config.shared_expert_intermediate_size:
        shared = block.shared_expert
        opening = torch.sigmoid(block.shared_expert_gate.weight[0] @ x)
        output = output + opening * mlp(x, shared.gate_proj.weight, shared.up_proj.weight, shared.down_proj.weight)
    return output, scores


def balance_loss(logits: Tensor, top_k: int, is_token: list[bool]) -> Tensor:
    """Return `E Σ_e f_e P_e` of one layer, for `logits` [T, E]; only tokens for which `is_token` count."""
    rows = [row for row, counts in zip(logits, is_token, strict=True) if counts]
    num_experts = logits.shape[-1]
    loss = 0.0
    for expert in range(num_experts):
        times_selected = sum(expert in [e for e, _ in select(row, top_k, False)] for row in rows)
        mean_probability = sum(softmax(row)[expert] for row in rows) / len(rows)
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
