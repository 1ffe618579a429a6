"""What a training step shows of itself: losses, the router's figures, speed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers.trainer_utils import IntervalStrategy

from modeling_upcycled_moe.losses_upcycled_moe import (
    ROUTER_LOSSES,
    computed_losses,
    token_weights,
)
from modeling_upcycled_moe.selection_upcycled_moe import sum_dtype

from ...common.blocks import count_targets
from ...common.flops import peak_flops, training_flops_per_token
from ...common.routing import RouterStatistics
from .gradients import gradient_norms
from .metrics import mean_over_layers, router_log
from .routing_view import RoutingView


class MonitoringMixin:
    """Logs, at each of `logging_steps`, means over the tokens of all steps since the last log.

    * `lm_loss`: `loss` without the router losses.
    * `router/layer_NN/...`: the router losses of each MoE layer, not weighted, as `aux_loss`, `z_loss` and so on, and
      the figures of `common/routing.py` but for the loads, which are in a file: see [`RoutingView`]; `router/...`:
      their means over layers.
    * `grad_norm/...`: of the step of the log, the norm of the gradients of each group in `groups.py`, before clipping.
    * `tokens_per_second`: over all processes, without the time for evaluation and saving; `mfu`: which share of what
      their devices could do at best that is, as `common/flops.py` counts, where that is known.
    """

    def set_up_monitoring(self) -> None:
        """Begin to count; after the Trainer's own set-up."""
        self.loss_names = computed_losses(self.model.config) if self.moe_layers else []
        # Of this process's training, for its summary.
        self.num_trained_tokens, self.training_seconds = 0.0, 0.0
        self.last_layers: dict[int, dict[str, Any]] = {}
        self._peak_flops = self._peak_of_all_devices()
        self._sequence_length: int | None = None
        self._is_under_way = False
        # The step that they are of, and the norms.
        self._gradient_norms: tuple[int, dict[str, torch.Tensor]] = (0, {})
        self._routing_view = RoutingView(self) if self.moe_layers else None
        # The first micro-batch starts the clock.
        self._clock_start: float | None = None
        self._reset_train_sums()

    def _peak_of_all_devices(self) -> float | None:
        """Return the operations a second that all devices could do at best, or None if that is not known."""
        types = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = types.get(self.accelerator.mixed_precision, self.model.dtype)
        peak = self.args.peak_flops_per_device or peak_flops(self.args.device, dtype)
        return None if peak is None else peak * self.args.world_size

    def _reset_train_sums(self) -> None:
        device = self.args.device
        # Tokens, targets, and the sums over targets of each router loss of each layer.
        num_losses = len(self.loss_names) * len(self.moe_layers)
        self._train_sums = torch.zeros(2 + num_losses, device=device, dtype=sum_dtype(device))
        num_experts = self.model.config.num_routed_experts if self.moe_layers else 0
        self._router_statistics = RouterStatistics(len(self.moe_layers), num_experts, device)
        # How often each expert was selected before the step under way, of what the statistics count.
        self._counted_loads = self._router_statistics.selected.clone()

    def figures_state(self) -> dict[str, Any]:
        """Return the figures so far, from which `restore_figures` goes back to this moment."""
        return {
            "train_sums": self._train_sums.clone(),
            "statistics": self._router_statistics.flatten(),
            "counted_loads": self._counted_loads.clone(),
            "gradient_norms": self._gradient_norms,
        }

    def restore_figures(self, state: dict[str, Any]) -> None:
        """Forget what was counted since `state`, the return value of `figures_state`."""
        self._train_sums = state["train_sums"]
        self._router_statistics = self._router_statistics.unflatten(state["statistics"])
        self._counted_loads = state["counted_loads"]
        self._gradient_norms = state["gradient_norms"]

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

    def get_batch_samples(self, *args, **kwargs):
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if batches and not self._is_under_way:
            self._is_under_way = True
            # Before context parallelism cuts it.
            self._sequence_length = batches[0]["input_ids"].shape[1]
            if self._routing_view is not None:
                self._routing_view.begin(batches[0])
        return batches, num_items

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
        losses = torch.cat([outputs.layer_router_losses[name] for name in self.loss_names])
        self._train_sums[2:] += losses.to(self._train_sums) * num_targets
        weights = token_weights(mask, inputs["input_ids"].numel())
        self._router_statistics.update(logits, selected, config, weights)

    def measure_gradient_norms(self, model: torch.nn.Module) -> None:
        """Keep the norms of the gradients by group, if this step will be logged; before they are clipped."""
        step, args = self.state.global_step + 1, self.args
        is_logged = args.logging_strategy == IntervalStrategy.STEPS and (
            step % self.state.logging_steps == 0 or (step == 1 and args.logging_first_step)
        )
        if not is_logged or not self._has_whole_gradients():
            return
        norms = gradient_norms(model.named_parameters())
        if self.accelerator.scaler is not None:
            norms = {group: norm / self.accelerator.scaler.get_scale() for group, norm in norms.items()}
        self._gradient_norms = (step, norms)

    def _has_whole_gradients(self) -> bool:
        """DeepSpeed keeps gradients to itself, and FSDP 1 a part of each, which does not know its whole."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        is_fsdp1 = plugin is not None and plugin.fsdp_version == 1
        return not is_fsdp1 and self.accelerator.distributed_type != DistributedType.DEEPSPEED

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Of all that is logged only the log of training steps has the one key, and only that of its end the other.
        if "loss" in logs:
            logs.update(self._train_log(logs["loss"]))
        elif "train_loss" in logs:
            self._end_monitoring()
        super().log(logs, start_time)

    def _take_figures(self) -> tuple[float, float, list[float], RouterStatistics, float]:
        """Return tokens, targets, loss sums and statistics of all processes since the last time, and the seconds."""
        sums = torch.cat([self._train_sums, self._router_statistics.flatten()])
        reduced = self.sum_over_batches(sums)
        num_own = len(self._train_sums)
        num_tokens, num_targets, *losses = reduced[:num_own].tolist()
        statistics = self._router_statistics.unflatten(reduced[num_own:])
        now = time.perf_counter()
        seconds, self._clock_start = now - self._clock_start, now
        self.num_trained_tokens += num_tokens
        self.training_seconds += seconds
        self._reset_train_sums()
        return num_tokens, num_targets, losses, statistics, seconds

    def _train_log(self, loss: float) -> dict[str, float]:
        """Return the figures since the last log, over all processes, and begin anew."""
        num_tokens, num_targets, losses, statistics, seconds = self._take_figures()
        step = self.state.global_step
        logs = {"lm_loss": loss, **self._gradient_log(step), **self.speed(num_tokens, seconds)}
        if not self.moe_layers:
            return logs
        losses = torch.tensor(losses).view(len(self.loss_names), -1) / max(num_targets, 1)  # [names, L]
        metrics = statistics.metrics()
        layers = {
            layer: {**dict(zip(self.loss_names, losses[:, number].tolist(), strict=True)), **metrics[number]}
            for number, layer in enumerate(self.moe_layers)
        }
        with self.not_timed():
            self._routing_view.show(step, round(num_tokens), layers)
        self.last_layers = layers
        means = mean_over_layers(layers)
        config = self.model.config
        router_loss = sum(getattr(config, ROUTER_LOSSES[name]) * means[f"router/{name}"] for name in self.loss_names)
        return {**logs, "lm_loss": loss - router_loss, **means, **router_log(layers)}

    def _gradient_log(self, step: int) -> dict[str, float]:
        measured_step, norms = self._gradient_norms
        if measured_step != step or not norms:
            return {}
        values = torch.stack(list(norms.values())).tolist()
        return {f"grad_norm/{group}": value for group, value in zip(norms, values, strict=True)}

    def speed(self, num_tokens: float, seconds: float) -> dict[str, float]:
        """Return `tokens_per_second` and, where the peak of the devices is known, `mfu`."""
        tokens_per_second = num_tokens / max(seconds, 1e-9)
        if self._peak_flops is None or self._sequence_length is None:
            return {"tokens_per_second": tokens_per_second}
        flops_per_token = training_flops_per_token(self.model.config, self._sequence_length)
        return {
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * flops_per_token / self._peak_flops,
        }

    def _end_monitoring(self) -> None:
        if not self._is_under_way:
            return
        if self._clock_start is not None:
            # What came after the last log.
            self._take_figures()
        if self._routing_view is not None:
            self._routing_view.end()
        # Another call of `train` begins anew.
        self._is_under_way, self._clock_start = False, None
