"""Router losses, one value for each MoE layer.

Dimensions: L MoE layers, T tokens, E experts, K experts per token.
"""

import torch
import torch.nn.functional as F


def token_weights(attention_mask: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
    """Return 1 for real and 0 for padding tokens [T], or None if there is no padding to mask.

    `attention_mask` is the [batch, sequence] mask that a user gives; with a cache it also covers past tokens, of
    which there are no logits, so only its last columns count. Other masks (4D, prepared ones) say nothing of padding.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return None
    sequence_length = num_tokens // attention_mask.shape[0]
    return attention_mask[:, -sequence_length:].reshape(-1).float()


def _masked_mean(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of `values` [T, ...] over tokens, counted by `weights` [T]."""
    if weights is None:
        return values.mean(dim=0)
    weights = weights.to(values.device)
    total = torch.einsum("t,t...->...", weights, values)
    return total / weights.sum().clamp(min=1)


def load_balancing_losses(
    router_logits: tuple[torch.Tensor, ...], num_experts_per_tok: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the load-balancing loss of each layer [L]: `E Σ_e f_e P_e`.

    `f_e` is the number of times that expert e was selected, per token, and `P_e` its mean probability. Balanced
    routing gives K, as in Transformers; unlike there, layers are not pooled, so that two collapsed layers cannot
    hide behind each other.

    Args:
        router_logits: one [T, E] tensor a layer.
        attention_mask: [batch, sequence], 0 for padding tokens, which do not count.
    Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6.
    """
    losses = []
    for logits in router_logits:
        num_experts = logits.shape[-1]
        weights = token_weights(attention_mask, logits.shape[0])
        probabilities = F.softmax(logits.float(), dim=-1)
        selected = torch.topk(probabilities, num_experts_per_tok, dim=-1).indices
        chosen = torch.zeros_like(probabilities).scatter(-1, selected, 1.0)
        loads = _masked_mean(chosen, weights)
        losses.append(num_experts * (loads * _masked_mean(probabilities, weights)).sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses])


def router_z_losses(
    router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the router z-loss of each layer [L]: the mean over tokens of `logsumexp(logits)²`.

    Args:
        router_logits: one [T, E] tensor a layer.
        attention_mask: [batch, sequence], 0 for padding tokens, which do not count.
    Source: ST-MoE (arXiv 2202.08906), equation 5.
    """
    losses = [
        _masked_mean(torch.logsumexp(logits.float(), dim=-1) ** 2, token_weights(attention_mask, logits.shape[0]))
        for logits in router_logits
    ]
    return torch.stack([loss.to(losses[0].device) for loss in losses])


__all__ = ["load_balancing_losses", "router_z_losses", "token_weights"]
