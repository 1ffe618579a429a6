"""One forward pass over labelled text, in which observers follow what each router does.

Dimensions: B blocks, S their length, T = B * S tokens, H hidden size, E experts to choose from, K slots of a token, L
MoE layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from transformers import PreTrainedModel

from .blocks import collate_blocks
from .labelled_text import Block, batches
from .moe_layers import MoeLayer, RoutedTokens, check_routing, observed
from .settings import SettingsError


class RoutingObserver(Protocol):
    """Follows what the MoE layers do with each batch."""

    def update(self, number: int, tokens: RoutedTokens) -> None:
        """Add what MoE layer `number`, counted from 0, did with a batch."""


class _Pass:
    """Tells the observers, layer by layer, what the routers do with the current batch; keeps none of it."""

    def __init__(self, layers: Sequence[MoeLayer], observers: Sequence[RoutingObserver], device: torch.device):
        self.layers = layers
        self.observers = observers
        self.is_finite = torch.ones(len(layers), dtype=torch.bool, device=device)  # [L]
        self.is_checked = [False] * len(layers)
        self.domain = 0
        self.batch: dict[str, torch.Tensor] = {}

    def begin(self, domain: int, batch: dict[str, torch.Tensor]) -> None:
        """Make `batch`, of that domain, the current one."""
        self.domain, self.batch = domain, batch

    def __call__(
        self,
        number: int,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        weights: torch.Tensor,
        selected: torch.Tensor,
    ) -> None:
        # On the device: reading each back would stop an accelerator.
        self.is_finite[number] &= torch.isfinite(router_logits).all()
        tokens = RoutedTokens(
            domain=self.domain,
            input_ids=self.batch["input_ids"],
            position_ids=self.batch["position_ids"],
            hidden_states=hidden_states,
            router_logits=router_logits,
            log_probabilities=self.layers[number].log_probabilities(router_logits),
            weights=weights,
            selected=selected,
        )
        if not self.is_checked[number]:
            self.check_finite()
            check_routing(self.layers[number], tokens)
            self.is_checked[number] = True
        for observer in self.observers:
            observer.update(number, tokens)

    def check_finite(self) -> None:
        """Raise an error if a router has seen what no figure can be computed from."""
        for layer, is_finite in zip(self.layers, self.is_finite.tolist(), strict=True):
            if not is_finite:
                raise SettingsError(
                    f"the router logits of layer {layer.index} are not finite; compute in float32 (--dtype float32), "
                    "and if they are not finite then either, the checkpoint is broken."
                )


@torch.inference_mode()
def run_pass(
    model: PreTrainedModel,
    layers: Sequence[MoeLayer],
    domains: Mapping[str, Sequence[Block]],
    observers: Sequence[RoutingObserver],
    batch_size: int,
    advance: Callable[[int], None] = lambda num_blocks: None,
) -> None:
    """Run the blocks of all `domains` through `model` and let `observers` see what its MoE `layers` do.

    Args:
        batch_size: blocks at a time.
        advance: called with the number of blocks after each batch.

    Raises:
        SettingsError: if a router computes what is not finite, or something else than the known ones.
    """
    routed = _Pass(layers, observers, model.device)
    with observed(layers, routed):
        for domain, blocks in enumerate(domains.values()):
            for batch in batches(blocks, batch_size):
                inputs = collate_blocks(batch)
                inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "position_ids")}
                routed.begin(domain, inputs)
                # Without the output head, whose logits are the largest tensor of all and say nothing here.
                model.base_model(**inputs, use_cache=False)
                advance(len(batch))
            routed.check_finite()
