"""What a training step shows of itself: losses, the router's figures, speed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from modeling_upcycled_moe.losses_upcycled_moe import (
    ROUTER_LOSSES,
    computed_losses,
    router_losses,
    token_weights,
)
from modeling_upcycled_moe.selection_upcycled_moe import sum_dtype

from ..common.routing import RouterStatistics
from .data import count_targets
from .metrics import mean_over_layers, router_log


class MonitoringMixin:
    """Logs, at each of `logging_steps`, means over the tokens of all steps since the last log.

    * `lm_loss`: `loss` without the router losses.
    * `router/layer_NN/...`: the router losses of each MoE layer, not weighted, as `aux_loss`, `z_loss` and so on, and
      the figures of `common/routing.py`, with the load of each expert as `load/expert_NN`; `router/...`: their means
      over layers.
    * `tokens_per_second`: over all processes, without the time for evaluation and saving.
    """

    def set_up_monitoring(self) -> None:
        """Begin to count; after the Trainer's own set-up."""
        self.loss_names = computed_losses(self.model.config) if self.moe_layers else []
        # The first micro-batch starts the clock.
        self._clock_start: float | None = None
        self._reset_train_sums()

    def _reset_train_sums(self) -> None:
        device = self.args.device
        # Tokens, targets, and the sums over targets of each router loss of each layer.
        num_losses = len(self.loss_names) * len(self.moe_layers)
        self._train_sums = torch.zeros(2 + num_losses, device=device, dtype=sum_dtype(device))
        num_experts = self.model.config.num_routed_experts if self.moe_layers else 0
        self._router_statistics = RouterStatistics(len(self.moe_layers), num_experts, device)
        # How often each expert was selected before the step under way, of what the statistics count.
        self._counted_loads = self._router_statistics.selected.clone()

    def figures_state(self) -> dict[str, torch.Tensor]:
        """Return the sums so far, from which `restore_figures` goes back to this moment."""
        return {
            "train_sums": self._train_sums.clone(),
            "statistics": self._router_statistics.flatten(),
            "counted_loads": self._counted_loads.clone(),
        }

    def restore_figures(self, state: dict[str, torch.Tensor]) -> None:
        """Forget what was counted since `state`, the return value of `figures_state`."""
        self._train_sums = state["train_sums"]
        self._router_statistics = self._router_statistics.unflatten(state["statistics"])
        self._counted_loads = state["counted_loads"]

    def take_step_loads(self) -> torch.Tensor:
        """Return how often each expert was selected in this process since the last call [L, E]."""
        selected = self._router_statistics.selected
        loads = selected - self._counted_loads
        self._counted_loads = selected.clone()
        return loads

    @contextmanager
    def not_timed(self) -> Iterator[None]:
        """Leave what happens inside out of `tokens_per_second`."""
        if self.args.device.type not in ("cpu", "mps"):
            # The training step before may still be running.
            torch.accelerator.synchronize()
        start = time.perf_counter()
        yield
        if self._clock_start is not None:
            self._clock_start += time.perf_counter() - start

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._clock_start is None:
            self._clock_start = time.perf_counter()
        if self.moe_layers:
            inputs = {**inputs, "output_router_logits": True}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self._add_router_figures(outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _add_router_figures(self, outputs: Any, inputs: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch to the sums, on the device: nothing waits for it."""
        num_targets = count_targets(inputs)
        self._train_sums[0] += inputs["input_ids"].numel()
        self._train_sums[1] += num_targets
        if not self.moe_layers:
            return
        config, mask = self.model.config, inputs.get("attention_mask")
        logits, selected = outputs.router_logits, outputs.selected_experts
        # A second time for these, but on [T, E] only: little beside the experts.
        losses = router_losses(config, logits, selected, mask, self.node)
        self._train_sums[2:] += (
            torch.cat([losses[name] for name in self.loss_names]).to(self._train_sums) * num_targets
        )
        weights = token_weights(mask, inputs["input_ids"].numel())
        self._router_statistics.update(logits, selected, config, weights)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Of all that is logged only the log of training steps has this key.
        if "loss" in logs:
            logs.update(self._train_log(logs["loss"]))
        super().log(logs, start_time)

    def _train_log(self, loss: float) -> dict[str, float]:
        """Return the figures since the last log, over all processes, and begin anew."""
        sums = torch.cat([self._train_sums, self._router_statistics.flatten()])
        reduced = self.sum_over_batches(sums)
        num_own = len(self._train_sums)
        num_tokens, num_targets, *losses = reduced[:num_own].tolist()
        statistics = self._router_statistics.unflatten(reduced[num_own:])
        now = time.perf_counter()
        logs = {"lm_loss": loss, "tokens_per_second": num_tokens / (now - self._clock_start)}
        self._clock_start = now
        self._reset_train_sums()
        if not self.moe_layers:
            return logs
        losses = torch.tensor(losses).view(len(self.loss_names), -1) / max(num_targets, 1)  # [names, L]
        metrics = statistics.metrics()
        layers = {
            layer: {**dict(zip(self.loss_names, losses[:, number].tolist(), strict=True)), **metrics[number]}
            for number, layer in enumerate(self.moe_layers)
        }
        means = mean_over_layers(layers)
        config = self.model.config
        router_loss = sum(getattr(config, ROUTER_LOSSES[name]) * means[f"router/{name}"] for name in self.loss_names)
        return {**logs, "lm_loss": loss - router_loss, **means, **router_log(layers)}
