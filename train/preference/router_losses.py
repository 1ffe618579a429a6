"""The router losses of MoE models in trainers of trl, which add none, or another one than the model's.

Dimensions: L MoE layers, T tokens, E experts to choose from, K slots of a token.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class RouterLossMixin:
    """Adds the router losses of an upcycled model to the loss of a trl trainer; before it in the bases.

    trl's RewardTrainer adds none. Its DPOTrainer calls the model without its head, and computes Transformers'
    load-balancing loss of all layers pooled. Here hooks at the model without its head take the routers' logits in each
    forward pass with gradients, and `compute_loss` adds what the model itself would add: each loss per layer, of
    experts that are chosen among only, without padding, with the coefficients of the configuration.
    """

    def set_up_router_losses(self) -> None:
        """Place the hooks; after the Trainer's own set-up. Dense models get none."""
        model = self.accelerator.unwrap_model(self.model)
        self._routed_model = model.get_base_model() if hasattr(model, "get_base_model") else model
        # The class is not asked for: remote code would be another one.
        self.moe_layers = list(getattr(self._routed_model.config, "moe_layers", []))
        self._router_losses: list[torch.Tensor] | None = None
        if self.moe_layers:
            # trl's own loss, whose experts and layers are counted otherwise.
            self.aux_loss_enabled = False
            backbone = self._routed_model.base_model
            backbone.register_forward_pre_hook(self._ask_for_routing, with_kwargs=True)
            backbone.register_forward_hook(self._take_routing, with_kwargs=True)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of the trainer with the router losses of the same forward pass added, in training."""
        if not self.moe_layers or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._taking_router_losses() as losses:
            # Outputs only where they are asked for: trl's DPOTrainer would run the model once more for them.
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        [router_loss] = losses
        loss = loss + router_loss.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def add_routing(self, inputs: Mapping[str, Any], outputs: Any, losses: Mapping[str, Any]) -> None:
        """Do nothing; a trainer that shows the routing counts it here.

        Args:
            inputs: of the model without its head, with the `attention_mask`.
            outputs: its outputs, with `router_logits` (one [T, E] a layer) and `selected_experts` (one [T, K]).
            losses: the fields of the model's output that hold router losses.
        """

    @contextmanager
    def _taking_router_losses(self) -> Iterator[list[torch.Tensor]]:
        config = self._routed_model.config
        kept, config.output_router_logits = config.output_router_logits, False
        self._router_losses = []
        try:
            yield self._router_losses
        finally:
            config.output_router_logits, self._router_losses = kept, None

    def _ask_for_routing(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        asked = {"output_router_logits": True, "output_selected_experts": True} if self._is_taking() else {}
        return args, {**kwargs, **asked}

    def _take_routing(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> None:
        if not self._is_taking():
            return
        losses = self._routed_model._router_losses(outputs, kwargs.get("attention_mask"))
        self._router_losses.append(losses["router_loss"])
        self.add_routing(kwargs, outputs, losses)
        # Nobody after it needs them, and heads would compute the losses again.
        outputs.router_logits = outputs.selected_experts = None

    def _is_taking(self) -> bool:
        # Passes without gradients are of a reference.
        return self._router_losses is not None and torch.is_grad_enabled()
