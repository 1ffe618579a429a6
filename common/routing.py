"""What a router does with its tokens, in figures.

Dimensions: L MoE layers, T tokens, E experts to choose from, K slots of a token.

With the routing probabilities `p_te`, the scores of token t scaled to sum to one, and the load `f_e`, the share of all
selections that went to expert e (`Σ_e f_e = 1`):

* `load`: `f` [E]; balanced routing gives `1 / E` everywhere.
* `entropy`: mean over tokens of `-Σ_e p_te ln p_te`, in nats: 0 if every token is sure, `ln E` if none prefers any.
* `load_entropy`: `-Σ_e f_e ln f_e`, in nats: `ln E` when balanced.
* `max_violation`: `max_e f_e / mean_e f_e - 1 = E max_e f_e - 1`: 0 when balanced.
* `dead_experts`: number of experts that no token selected.
* `experts_per_token`: mean number of experts that a token got; K unless the selection leaves slots empty.
* `logit_std`: `sqrt(mean over tokens of the variance of the logits over experts)`. A shift of all logits of a token
  changes no routing, so only the spread within a token counts.
"""

from collections.abc import Sequence

import torch

from modeling_upcycled_moe import UpcycledQwenMoeConfig, expert_counts
from modeling_upcycled_moe.selection_upcycled_moe import routing_log_probabilities, sum_dtype


# Tokens that are counted at a time, so that the memory for it does not grow with the batch.
CHUNK_TOKENS = 8192


class RouterStatistics:
    """Sums over tokens, for several layers, from which the figures above follow.

    Sums stay on the device of the logits and nothing is read back before `metrics`, so that updating does not stop an
    accelerator. Sums of several processes add up: `flatten` gives them as one vector to reduce, `unflatten` takes it.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device | str = "cpu"):
        dtype = sum_dtype(device)
        self.selected = torch.zeros(num_layers, num_experts, dtype=dtype, device=device)  # [L, E]
        self.entropy = torch.zeros(num_layers, dtype=dtype, device=device)  # [L]
        self.variance = torch.zeros(num_layers, dtype=dtype, device=device)  # [L]
        self.num_tokens = torch.zeros(num_layers, dtype=dtype, device=device)  # [L]

    @torch.no_grad()
    def update(
        self,
        router_logits: Sequence[torch.Tensor],
        selected_experts: Sequence[torch.Tensor],
        config: UpcycledQwenMoeConfig,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Add the tokens of one batch.

        Args:
            router_logits: One [T, E] tensor a layer.
            selected_experts: One [T, K] tensor a layer; E in an empty slot.
            config: Says how probabilities follow from logits.
            weights: 1 for tokens that count and 0 for padding [T]; all count by default.
        """
        for layer, (logits, selected) in enumerate(zip(router_logits, selected_experts, strict=True)):
            for begin in range(0, logits.shape[0], CHUNK_TOKENS):
                chunk = slice(begin, begin + CHUNK_TOKENS)
                log_probabilities = routing_log_probabilities(logits[chunk], config)
                counted = None if weights is None else weights[chunk]
                self._add(layer, logits[chunk], log_probabilities, selected[chunk], counted)

    def _add(
        self,
        layer: int,
        logits: torch.Tensor,
        log_probabilities: torch.Tensor,
        selected: torch.Tensor,
        weights: torch.Tensor | None,
    ) -> None:
        """Add the tokens of `logits` [T, E] to those of a layer."""
        device, dtype = self.selected.device, self.selected.dtype
        if weights is None:
            counted = torch.ones(logits.shape[0], dtype=dtype, device=logits.device)
        else:
            counted = weights.to(logits.device, dtype)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)  # [T]
        variance = logits.float().var(dim=-1, correction=0)  # [T]
        self.selected[layer] += expert_counts(selected, logits.shape[1], counted).to(device)
        self.entropy[layer] += (counted @ entropy.to(dtype)).to(device)
        self.variance[layer] += (counted @ variance.to(dtype)).to(device)
        self.num_tokens[layer] += counted.sum().to(device)

    def flatten(self) -> torch.Tensor:
        """Return all sums as one vector."""
        return torch.cat([self.selected.flatten(), self.entropy, self.variance, self.num_tokens])

    def unflatten(self, sums: torch.Tensor) -> "RouterStatistics":
        """Return the statistics with these sums, e.g. those of several processes added up."""
        num_layers, num_experts = self.selected.shape
        statistics = RouterStatistics(num_layers, num_experts, sums.device)
        parts = sums.split([num_layers * num_experts, num_layers, num_layers, num_layers])
        statistics.selected = parts[0].view(num_layers, num_experts)
        statistics.entropy, statistics.variance, statistics.num_tokens = parts[1:]
        return statistics

    def metrics(self) -> list[dict[str, float | list[float]]]:
        """Return the figures of each layer; zeros for a layer that saw no token."""
        sums = (self.selected.cpu(), self.entropy.tolist(), self.variance.tolist(), self.num_tokens.tolist())
        return [_metrics_of(*layer) for layer in zip(*sums, strict=True)]


def _metrics_of(
    selected: torch.Tensor, entropy: float, variance: float, num_tokens: float
) -> dict[str, float | list[float]]:
    num_tokens = max(num_tokens, 1.0)
    load = selected / selected.sum().clamp(min=1.0)  # [E]
    return {
        "load": load.tolist(),
        "entropy": entropy / num_tokens,
        "load_entropy": torch.special.entr(load).sum().item(),
        "max_violation": len(load) * load.max().item() - 1,
        "dead_experts": int((selected == 0).sum()),
        "experts_per_token": selected.sum().item() / num_tokens,
        "logit_std": (variance / num_tokens) ** 0.5,
    }


def router_metrics(
    router_logits: torch.Tensor,
    selected_experts: torch.Tensor,
    config: UpcycledQwenMoeConfig,
    weights: torch.Tensor | None = None,
) -> dict[str, float | list[float]]:
    """Return the figures of one router for one batch of logits [T, E]; the rest is as in `RouterStatistics.update`."""
    statistics = RouterStatistics(1, router_logits.shape[-1], router_logits.device)
    statistics.update([router_logits], [selected_experts], config, weights)
    return statistics.metrics()[0]
