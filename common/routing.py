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


# Tokens, of all layers together, that are counted at a time, so that the memory for it does not grow with the batch.
CHUNK_TOKENS = 16384


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
        device, dtype = self.selected.device, self.selected.dtype
        num_layers, num_tokens = len(router_logits), router_logits[0].shape[0]
        counted = torch.ones(num_tokens, dtype=dtype, device=device) if weights is None else weights.to(device, dtype)
        # All layers at once: few large operations keep an accelerator busy, many small ones do not.
        length = max(CHUNK_TOKENS // num_layers, 1)
        for begin in range(0, num_tokens, length):
            chunk = slice(begin, begin + length)
            logits = torch.stack([layer[chunk].to(device) for layer in router_logits])  # [L, T, E]
            selected = torch.stack([layer[chunk].to(device) for layer in selected_experts])  # [L, T, K]
            self._add(slice(None), logits, selected, routing_log_probabilities(logits, config), counted[chunk])

    @torch.no_grad()
    def update_layer(
        self, layer: int, router_logits: torch.Tensor, selected_experts: torch.Tensor, log_probabilities: torch.Tensor
    ) -> None:
        """Add tokens that one layer routed, by any router.

        Args:
            layer: Number of the layer, from 0.
            router_logits: [T, E].
            selected_experts: [T, K]; E in an empty slot.
            log_probabilities: Logarithms of the scores, which sum to one [T, E].
        """
        counted = torch.ones(len(router_logits), dtype=self.selected.dtype, device=self.selected.device)
        tokens = (router_logits, selected_experts, log_probabilities)
        self._add(slice(layer, layer + 1), *(each[None].to(counted.device) for each in tokens), counted)

    def _add(
        self,
        layers: slice,
        logits: torch.Tensor,
        selected: torch.Tensor,
        log_probabilities: torch.Tensor,
        counted: torch.Tensor,
    ) -> None:
        """Add tokens of some layers, with logits [L, T, E] and experts [L, T, K], counted by weights [T]."""
        num_layers, _, num_experts = logits.shape
        # The experts of each layer have numbers of their own, and so has its empty slot.
        first = torch.arange(num_layers, device=selected.device)[:, None, None] * (num_experts + 1)
        counts = expert_counts(
            (selected + first).flatten(0, 1), num_layers * (num_experts + 1), counted.repeat(num_layers)
        )
        self.selected[layers] += counts.view(num_layers, num_experts + 1)[:, :-1]
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)  # [L, T]
        logits = logits.float()
        variance = (logits - logits.mean(dim=-1, keepdim=True)).square_().mean(dim=-1)  # [L, T]
        self.entropy[layers] += entropy.to(counted) @ counted
        self.variance[layers] += variance.to(counted) @ counted
        self.num_tokens[layers] += counted.sum()

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


def selection_overlap(first: torch.Tensor, second: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return the mean share [L] of a token's experts that two selections [L, T, K] have in common; E is an empty slot.

    The share is of its experts in the selection that gives it more; the order does not count.
    """
    return torch.stack([_layer_overlap(*pair, num_experts) for pair in zip(first, second, strict=True)])


def _layer_overlap(first: torch.Tensor, second: torch.Tensor, num_experts: int) -> torch.Tensor:
    is_filled = first < num_experts  # [T, K]
    # An expert is in no two slots of a token.
    common = (is_filled[:, :, None] & (first[:, :, None] == second[:, None, :])).sum(dim=(1, 2))
    largest = torch.maximum(is_filled.sum(dim=1), (second < num_experts).sum(dim=1))
    # Tokens that both leave without an expert agree.
    return torch.where(largest > 0, common / largest.clamp(min=1), 1.0).mean()
