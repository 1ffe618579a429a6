"""Blocks of routed tokens for tests of measures that look at their order, their ids or their hidden states.

Dimensions: B blocks, S their length, T = B * S tokens, E experts, K slots of a token.
"""

import torch

from upcycled_moe.common.moe_layers import RoutedTokens


def routed_blocks(
    selected: torch.Tensor,
    num_experts: int,
    *,
    domain: int = 0,
    input_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    hidden_states: torch.Tensor | None = None,
    log_probabilities: torch.Tensor | None = None,
) -> RoutedTokens:
    """Return tokens with these experts [B, S, K], the best first unless `log_probabilities` [T, E] say otherwise."""
    num_blocks, block_size, num_slots = selected.shape
    positions = torch.arange(block_size).expand(num_blocks, -1)
    flat = selected.flatten(0, 1)
    if log_probabilities is None:
        scores = torch.full((len(flat), num_experts + 1), -9.0)
        log_probabilities = scores.scatter(1, flat, -torch.arange(num_slots).float().expand_as(flat))[:, :-1]
    return RoutedTokens(
        domain=domain,
        input_ids=positions if input_ids is None else input_ids,
        position_ids=positions if position_ids is None else position_ids,
        hidden_states=torch.zeros(len(flat), 1) if hidden_states is None else hidden_states,
        router_logits=log_probabilities,
        log_probabilities=log_probabilities,
        weights=(flat < num_experts).float(),
        selected=flat,
    )


def random_selection(
    num_blocks: int, block_size: int, num_experts: int, num_slots: int, seed: int = 0, empty: float = 0.0
) -> torch.Tensor:
    """Return experts [B, S, K] by uneven loads; a share `empty` of the slots is empty."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_experts, generator=generator) + torch.randn(
        num_blocks, block_size, num_experts, generator=generator
    )
    selected = logits.topk(num_slots).indices
    is_empty = torch.rand(selected.shape, generator=generator) < empty
    return selected.masked_fill(is_empty, num_experts)


def block_of(tokens: RoutedTokens, *blocks: int) -> RoutedTokens:
    """Return some blocks of `tokens`."""
    num_blocks, block_size = tokens.input_ids.shape
    index = torch.arange(num_blocks * block_size).view(num_blocks, block_size)[list(blocks)].flatten()
    flat = ("hidden_states", "router_logits", "log_probabilities", "weights", "selected")
    return RoutedTokens(
        domain=tokens.domain,
        input_ids=tokens.input_ids[list(blocks)],
        position_ids=tokens.position_ids[list(blocks)],
        **{name: getattr(tokens, name)[index] for name in flat},
    )
