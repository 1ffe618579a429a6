"""Router losses, one value for each MoE layer.

Dimensions: L MoE layers, T tokens, E experts to choose from, K slots of a token.
"""

import torch

from .selection_upcycled_moe import routing_log_probabilities


# Field of the model's output that a loss is in, and of the configuration that its weight is in.
ROUTER_LOSSES = {
    "aux_loss": "router_aux_loss_coef",
    "z_loss": "router_z_loss_coef",
    "entropy_loss": "router_entropy_loss_coef",
    "locality_loss": "router_locality_loss_coef",
}


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
    probabilities: tuple[torch.Tensor, ...],
    selected_experts: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the load-balancing loss of each layer [L]: `E Σ_e f_e P_e`.

    `f_e` is the number of times that expert e was selected, per token, and `P_e` its mean probability. Balanced
    routing gives K, as in Transformers; unlike there, layers are not pooled, so that two collapsed layers cannot
    hide behind each other.

    Args:
        probabilities: one [T, E] tensor a layer.
        selected_experts: one [T, K] tensor a layer; E in an empty slot.
        attention_mask: [batch, sequence], 0 for padding tokens, which do not count.
    Source: Switch Transformer (arXiv 2101.03961), equations 4 to 6.
    """
    losses = []
    for layer_probabilities, selected in zip(probabilities, selected_experts, strict=True):
        num_tokens, num_experts = layer_probabilities.shape
        weights = token_weights(attention_mask, num_tokens)
        chosen = layer_probabilities.new_zeros(num_tokens, num_experts + 1).scatter(-1, selected, 1.0)[:, :-1]
        loads = _masked_mean(chosen, weights)
        losses.append(num_experts * (loads * _masked_mean(layer_probabilities, weights)).sum())
    return _stack(losses)


def router_z_losses(
    router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None, num_groups: int = 1
) -> torch.Tensor:
    """Return the router z-loss of each layer [L]: the mean over tokens, and groups, of `logsumexp(logits)²`.

    Args:
        router_logits: one [T, E] tensor a layer.
        num_groups: parts of the logits that have a softmax of their own.
        attention_mask: [batch, sequence], 0 for padding tokens, which do not count.
    Source: ST-MoE (arXiv 2202.08906), equation 5.
    """
    losses = []
    for logits in router_logits:
        normalizers = torch.logsumexp(logits.float().unflatten(-1, (num_groups, -1)), dim=-1)  # [T, G]
        losses.append(_masked_mean((normalizers**2).mean(dim=-1), token_weights(attention_mask, logits.shape[0])))
    return _stack(losses)


def router_entropy_losses(
    log_probabilities: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the mean over tokens of `-Σ_e p_e ln p_e`, in nats, of each layer [L].

    Args:
        log_probabilities: `ln p`, one [T, E] tensor a layer.
        attention_mask: [batch, sequence], 0 for padding tokens, which do not count.
    Source: Harder Tasks Need More Experts (arXiv 2403.07652), its dynamic loss.
    """
    return _stack(
        [
            _masked_mean(-(layer.exp() * layer).sum(dim=-1), token_weights(attention_mask, layer.shape[0]))
            for layer in log_probabilities
        ]
    )


def locality_losses(
    probabilities: tuple[torch.Tensor, ...],
    expert_nodes: list[int],
    node: int,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `-ln Σ_{e on node} P_e` of each layer [L], with the mean probability `P_e` of expert e.

    That is the Kullback-Leibler divergence from where this node's tokens go to all of them staying on it. The paper
    writes the divergence the other way round, which is infinite as soon as one token leaves.

    Args:
        probabilities: one [T, E] tensor a layer.
        expert_nodes: node of each expert [E].
        node: node that the tokens are on.
        attention_mask: [batch, sequence], 0 for padding tokens, which do not count.
    Raises:
        ValueError: if no expert is on `node`.
    Source: LocMoE (arXiv 2401.13920), its locality loss.
    """
    local = [expert for expert, expert_node in enumerate(expert_nodes) if expert_node == node]
    if not local:
        raise ValueError(f"expert_nodes={expert_nodes} puts no expert on node {node}, where this process is.")
    losses = []
    for layer in probabilities:
        mean = _masked_mean(layer, token_weights(attention_mask, layer.shape[0]))
        losses.append(-mean[local].sum().clamp(min=torch.finfo(mean.dtype).tiny).log())
    return _stack(losses)


def computed_losses(config) -> list[str]:
    """Return the names of the losses that `router_losses` gives: balance and z-loss, and others that have a weight."""
    return [
        name
        for name, coefficient in ROUTER_LOSSES.items()
        if name in ("aux_loss", "z_loss") or getattr(config, coefficient) > 0
    ]


def router_losses(
    config,
    router_logits: tuple[torch.Tensor, ...],
    selected_experts: tuple[torch.Tensor, ...],
    attention_mask: torch.Tensor | None = None,
    node: int = 0,
) -> dict[str, torch.Tensor]:
    """Return the losses [L] of `computed_losses` by their names, not weighted.

    Args:
        router_logits: one [T, E] tensor a layer.
        selected_experts: one [T, K] tensor a layer; E in an empty slot.
        attention_mask: [batch, sequence], 0 for padding tokens, which do not count.
        node: node that the tokens are on, for the locality loss.
    """
    log_probabilities = tuple(routing_log_probabilities(logits, config) for logits in router_logits)
    probabilities = tuple(layer.exp() for layer in log_probabilities)
    num_groups = config.num_expert_groups if config.router_selection == "prototype_top_k" else 1
    functions = {
        "aux_loss": lambda: load_balancing_losses(probabilities, selected_experts, attention_mask),
        "z_loss": lambda: router_z_losses(router_logits, attention_mask, num_groups),
        "entropy_loss": lambda: router_entropy_losses(log_probabilities, attention_mask),
        "locality_loss": lambda: locality_losses(probabilities, config.expert_nodes, node, attention_mask),
    }
    return {name: functions[name]() for name in computed_losses(config)}


def _stack(losses: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([loss.to(losses[0].device) for loss in losses])


__all__ = [
    "ROUTER_LOSSES",
    "computed_losses",
    "load_balancing_losses",
    "locality_losses",
    "router_entropy_losses",
    "router_losses",
    "router_z_losses",
    "token_weights",
]
