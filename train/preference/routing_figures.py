"""What the routers of a model do while trl trains it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from modeling_upcycled_moe.losses_upcycled_moe import ROUTER_LOSSES, computed_losses, token_weights

from ...common.routing import RouterStatistics
from ...common.routing_log import ROUTING_LOG_FILE, append_routing, cut_routing
from ..messages import tell
from ..monitoring.collapse import CollapseWatch
from ..monitoring.metrics import mean_over_layers, router_log
from .router_losses import RouterLossMixin


class RoutingFiguresMixin(RouterLossMixin):
    """Logs, at each of `logging_steps`, the routers' figures over all steps since the last log.

    * `preference_loss`: `loss` without the router losses.
    * `router/layer_NN/...`: the router losses of each MoE layer, not weighted, as means over micro-batches, and the
      figures of `common/routing.py` but for the loads; `router/...`: their means over layers.

    `routing.jsonl` in the output folder has them with the loads, and collapsed layers are warned of.
    """

    def set_up_routing_figures(self) -> None:
        """Begin to count; after the Trainer's own set-up."""
        self.set_up_router_losses()
        self.loss_names = computed_losses(self.model.config) if self.moe_layers else []
        if self.moe_layers:
            self._reset_routing_figures()
            self.add_callback(_RoutingLogCallback(self))

    def add_routing(self, inputs: Mapping[str, Any], outputs: Any, losses: Mapping[str, Any]) -> None:
        """Add a micro-batch to the sums, on the device: nothing waits for it."""
        mask = inputs.get("attention_mask")
        num_tokens = outputs.router_logits[0].shape[0]
        weights = token_weights(mask, num_tokens)
        with torch.no_grad():
            values = torch.cat([losses["layer_router_losses"][name] for name in self.loss_names])
            self._routing_sums[0] += 1
            self._routing_sums[1] += num_tokens if weights is None else weights.sum()
            self._routing_sums[2:] += values.to(self._routing_sums)
            self._router_statistics.update(
                outputs.router_logits, outputs.selected_experts, self._routed_model.config, weights
            )

    def take_step_loads(self) -> torch.Tensor:
        """Return how often each expert was selected in this process since the last call [L, E]."""
        selected = self._router_statistics.selected
        loads = selected - self._counted_loads
        self._counted_loads = selected.clone()
        return loads

    def sum_over_batches(self, sums: torch.Tensor) -> torch.Tensor:
        """Return `sums` added up over processes."""
        return self.accelerator.reduce(sums, reduction="sum")

    @property
    def step_was_skipped(self) -> bool:
        """Whether the step that has just ended left the weights as they were."""
        return self.accelerator.optimizer_step_was_skipped

    def _reset_routing_figures(self) -> None:
        device, num_layers = self.args.device, len(self.moe_layers)
        # Micro-batches, tokens, and the sums of each router loss of each layer.
        self._routing_sums = torch.zeros(2 + len(self.loss_names) * num_layers, device=device)
        self._router_statistics = RouterStatistics(num_layers, self._routed_model.config.num_routed_experts, device)
        self._counted_loads = self._router_statistics.selected.clone()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Of all that is logged only the log of training steps has this key.
        if self.moe_layers and "loss" in logs:
            logs.update(self._routing_log(logs["loss"]))
        super().log(logs, start_time)

    def _routing_log(self, loss: float) -> dict[str, float]:
        sums = self.sum_over_batches(torch.cat([self._routing_sums, self._router_statistics.flatten()]))
        num_own = len(self._routing_sums)
        num_batches, num_tokens, *losses = sums[:num_own].tolist()
        metrics = self._router_statistics.unflatten(sums[num_own:]).metrics()
        self._reset_routing_figures()
        losses = torch.tensor(losses).view(len(self.loss_names), -1) / max(num_batches, 1)  # [names, L]
        layers = {
            layer: {**dict(zip(self.loss_names, losses[:, number].tolist(), strict=True)), **metrics[number]}
            for number, layer in enumerate(self.moe_layers)
        }
        if self.is_world_process_zero():
            self._routing_log_callback.show(self.state.global_step, round(num_tokens), layers)
        means = mean_over_layers(layers)
        config = self._routed_model.config
        router_loss = sum(getattr(config, ROUTER_LOSSES[name]) * means[f"router/{name}"] for name in self.loss_names)
        return {"preference_loss": loss - router_loss, **means, **router_log(layers)}


class _RoutingLogCallback(TrainerCallback):
    """Keeps the file of the routing, and watches for collapsed layers."""

    def __init__(self, trainer: RoutingFiguresMixin):
        trainer._routing_log_callback = self
        self.path = Path(trainer.args.output_dir, ROUTING_LOG_FILE)
        self._watch: CollapseWatch | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Remove what was written after the checkpoint that a run goes on from."""
        if args.router_collapse_threshold > 0:
            self._watch = CollapseWatch(args.router_collapse_threshold, args.get_warmup_steps(state.max_steps))
        if state.is_world_process_zero:
            cut_routing(self.path, state.global_step)

    def show(self, step: int, num_tokens: int, layers: Mapping[int, Mapping[str, Any]]) -> None:
        """Write the figures of a log, and warn of layers that have collapsed."""
        append_routing(self.path, step, num_tokens, layers)
        for line in self._watch.observe(step, num_tokens, layers) if self._watch else ():
            tell(line)
