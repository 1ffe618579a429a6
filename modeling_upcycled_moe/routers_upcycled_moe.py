"""Routers: from a token's hidden state to the experts that it is sent to.

Dimensions: T tokens, H hidden size, E experts to choose from, K slots of a token, R routers, J keys, D router head
size.

A router type is a subclass of `Router` that gives the scores, and an entry in `ROUTERS`; the selection that follows is
shared, see `selection_upcycled_moe.py`.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

from .selection_upcycled_moe import ExpertSelector


class Router(nn.Module):
    """Select the experts of each token from the scores of a subclass."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.hidden_dim = config.hidden_size
        # Those with computation; expert-parallel plans of Transformers share them out.
        self.num_experts = config.num_experts
        self.num_routed_experts = config.num_routed_experts
        self.selector = ExpertSelector(config)

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the router logits [T, E] of `hidden_states` [T, H], computed in the type of these."""
        raise NotImplementedError

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of `score` for one token, two for each weight that it is multiplied with."""
        raise NotImplementedError

    @property
    def fold_obstacle(self) -> str | None:
        """Why no linear router gives the same logits; None if one does."""
        return None

    def fold(self) -> torch.Tensor:
        """Return the weight [E, H] of the linear router that gives the same logits.

        Raises:
            ValueError: if no linear router does; see `fold_obstacle`.
        """
        if self.fold_obstacle:
            raise ValueError(self.fold_obstacle)
        return self.folded_weight()

    def folded_weight(self) -> torch.Tensor:
        """Return the weight for `fold`, where nothing stands in the way."""
        raise NotImplementedError

    def reset_parameters(self, std: float) -> None:
        """Draw the parameters from N(0, std)."""
        for parameter in self.parameters(recurse=False):
            init.normal_(parameter, mean=0.0, std=std)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return router logits [T, E], the weights [T, K] and the indices [T, K] of the experts of each token.

        Expert-parallel plans of Transformers rely on this order.
        """
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        weights_dtype, in_float32 = None, self.config.router_dtype == "float32"
        if in_float32:
            # The experts mix their outputs in the type of the tokens as ever.
            weights_dtype, hidden_states = hidden_states.dtype, hidden_states.float()
        jitter_noise = self.config.router_jitter_noise
        if self.training and jitter_noise > 0:
            noise = torch.empty_like(hidden_states).uniform_(1.0 - jitter_noise, 1.0 + jitter_noise)
            hidden_states = hidden_states * noise
        with maybe_autocast(hidden_states.device.type, enabled=False) if in_float32 else nullcontext():
            router_logits = self.score(hidden_states)
        weights, index = self.selector(router_logits)
        return router_logits, weights.to(weights_dtype or router_logits.dtype), index


class LinearRouter(Router):
    """One linear map from token to scores, named and shaped as in stock Qwen MoE models."""

    def __init__(self, config):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(self.num_routed_experts, self.hidden_dim))  # [E, H]

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states, self.weight.to(hidden_states.dtype))

    @property
    def flops_per_token(self) -> int:
        return 2 * self.weight.numel()

    def folded_weight(self) -> torch.Tensor:
        return self.weight.detach().clone()


class MixtureRouter(Router):
    """Several routers, each with its own view of the token, that score the experts' keys together.

    Router r sees the query `W_r x`; key j scores `Σ_r (W_r x)·k_j` (`sum`) or `max_r (W_r x)·k_j` (`max`). Keys are
    ordered by the expert that owns them, and an expert scores as the best of its keys. Neither queries nor keys are
    normalised.

    Source: Router Upcycling (arXiv 2509.00679), equations 6 to 9; pooling: section 6.2; several keys: section 6.1.
    """

    def __init__(self, config):
        super().__init__(config)
        self.num_routers = config.num_routers
        self.num_keys = config.num_router_keys
        self.pooling = config.router_pooling
        head_dim = config.router_head_dim
        self.query_weight = nn.Parameter(torch.empty(self.num_routers, head_dim, self.hidden_dim))  # [R, D, H]
        self.keys = nn.Parameter(torch.empty(self.num_keys, head_dim))  # [J, D]

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        query_weight, keys = self.query_weight.to(dtype), self.keys.to(dtype)
        if self.pooling == "sum":
            # The sum over routers moves inside: Σ_r (W_r x)·k = ((Σ_r W_r) x)·k, R times less work.
            key_scores = F.linear(F.linear(hidden_states, query_weight.sum(dim=0)), keys)  # [T, J]
        else:
            queries = F.linear(hidden_states, query_weight.flatten(0, 1))  # [T, R * D]
            key_scores = F.linear(queries.unflatten(-1, (self.num_routers, -1)), keys).amax(dim=1)  # [T, J]
        if self.num_keys == self.num_routed_experts:
            return key_scores
        return key_scores.unflatten(-1, (self.num_routed_experts, -1)).amax(dim=-1)

    @property
    def flops_per_token(self) -> int:
        num_queries = 1 if self.pooling == "sum" else self.num_routers
        query_weights = num_queries * self.query_weight[0].numel()
        return 2 * (query_weights + num_queries * self.keys.numel())

    @property
    def fold_obstacle(self) -> str | None:
        if self.pooling != "sum":
            return (
                f"router_pooling={self.pooling!r} does not fold into a linear router: "
                "the maximum over routers is not linear in the token. Only 'sum' folds."
            )
        if self.num_keys != self.num_routed_experts:
            return (
                f"num_router_keys={self.num_keys} for {self.num_routed_experts} experts does not fold into a "
                "linear router: the best of several keys is not linear in the token. Only one key an expert folds."
            )
        return None

    def folded_weight(self) -> torch.Tensor:
        # In float64: at 64 experts, folding in bfloat16 changes the experts of about 3 % of the tokens.
        folded = self.keys.detach().double() @ self.query_weight.detach().double().sum(dim=0)
        return folded.to(self.query_weight.dtype)


class MLPRouter(Router):
    """Two layers with a GELU between them, H to H to E.

    Source: baseline of Router Upcycling (arXiv 2509.00679), section 4.3.
    """

    def __init__(self, config):
        super().__init__(config)
        self.up_weight = nn.Parameter(torch.empty(self.hidden_dim, self.hidden_dim))  # [H, H]
        self.down_weight = nn.Parameter(torch.empty(self.num_routed_experts, self.hidden_dim))  # [E, H]

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        return F.linear(F.gelu(F.linear(hidden_states, self.up_weight.to(dtype))), self.down_weight.to(dtype))

    @property
    def flops_per_token(self) -> int:
        return 2 * (self.up_weight.numel() + self.down_weight.numel())

    @property
    def fold_obstacle(self) -> str | None:
        return "router_type='mlp' does not fold into a linear router: its GELU is not linear in the token."


class GroupedAverageRouter(Router):
    """The mean of a part of the token, one part of `H / E` neighbours for each expert; nothing is learned.

    Source: LocMoE (arXiv 2401.13920), its grouped average pooling.
    """

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.unflatten(-1, (self.num_routed_experts, -1)).mean(dim=-1)

    @property
    def flops_per_token(self) -> int:
        return self.hidden_dim

    def folded_weight(self) -> torch.Tensor:
        part = self.hidden_dim // self.num_routed_experts
        return torch.eye(self.num_routed_experts).repeat_interleave(part, dim=1) / part


ROUTERS = {
    "linear": LinearRouter,
    "mixture": MixtureRouter,
    "mlp": MLPRouter,
    "grouped_average": GroupedAverageRouter,
}


__all__ = ["ROUTERS", "GroupedAverageRouter", "LinearRouter", "MLPRouter", "MixtureRouter", "Router"]
