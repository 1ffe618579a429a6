"""The Trainer, with the router's figures in its log, this recipe's schedule, and perplexity by domain."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import SchedulerType, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from modeling_upcycled_moe.losses_upcycled_moe import (
    ROUTER_LOSSES,
    computed_losses,
    router_losses,
    token_weights,
)
from modeling_upcycled_moe.selection_upcycled_moe import sum_dtype

from ..common.routing import RouterStatistics
from ..common.settings import SettingsError
from .data import IGNORED_LABEL, collate_blocks
from .metrics import mean_over_layers, router_log
from .schedule import step_decay_schedule


class UpcyclingTrainer(Trainer):
    """[`Trainer`] for upcycled MoE checkpoints, and for dense ones, which have no router figures.

    It logs, at each of `logging_steps`, means over the tokens of all steps since the last log:

    * `lm_loss`: `loss` without the router losses.
    * `router/layer_NN/...`: the router losses of each MoE layer, not weighted, as `aux_loss`, `z_loss` and so on, and
      the figures of `common/routing.py`, with the load of each expert as `load/expert_NN`; `router/...`: their means
      over layers.
    * `tokens_per_second`: over all processes, without the time for evaluation and saving.

    and at each evaluation `eval_<domain>_loss` and `_perplexity` of the language-modeling loss alone, with `eval_loss`
    and `eval_perplexity` over the tokens of all domains.

    Routers with `use_router_bias` have their biases moved after each step, by the loads of all its tokens.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, data_collator=kwargs.pop("data_collator", collate_blocks), **kwargs)
        # Dense models have no MoE layers. The class is not asked for: remote code would be another one.
        self.moe_layers = list(getattr(self.model.config, "moe_layers", []))
        self.node = 0
        self.loss_names = computed_losses(self.model.config) if self.moe_layers else []
        # The first micro-batch starts the clock.
        self._clock_start: float | None = None
        self._reset_train_sums()
        self._set_node()
        if self.moe_layers and self.model.config.use_router_bias:
            self._check_biases_can_be_sharded()
            self.add_callback(_RouterBiasCallback(self))

    def _reset_train_sums(self) -> None:
        device = self.args.device
        # Tokens, targets, and the sums over targets of each router loss of each layer.
        num_losses = len(self.loss_names) * len(self.moe_layers)
        self._train_sums = torch.zeros(2 + num_losses, device=device, dtype=sum_dtype(device))
        num_experts = self.model.config.num_routed_experts if self.moe_layers else 0
        self._router_statistics = RouterStatistics(len(self.moe_layers), num_experts, device)
        # How often each expert was selected before the step under way, of what the statistics count.
        self._counted_loads = self._router_statistics.selected.clone()

    def _set_node(self) -> None:
        """Tell the model which node it is on, for the locality loss.

        Raises:
            SettingsError: if the run has other nodes than `expert_nodes` names.
        """
        if "locality_loss" not in self.loss_names:
            return
        # `torchrun` and `accelerate launch` number the nodes so; a single process is on the first.
        self.node = int(os.environ.get("GROUP_RANK", "0"))
        if self.args.world_size > 1 and "GROUP_WORLD_SIZE" not in os.environ:
            raise SettingsError(
                "router_locality_loss_coef needs to know the node of each process, which the launcher does not tell "
                "(GROUP_RANK, GROUP_WORLD_SIZE); start with torchrun or accelerate launch."
            )
        num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        if set(self.model.config.expert_nodes) != set(range(num_nodes)):
            raise SettingsError(
                f"expert_nodes={self.model.config.expert_nodes} must name the nodes of this run, 0 to "
                f"{num_nodes - 1}; give it for them, or router_locality_loss_coef=0."
            )
        for module in self.model.modules():
            # Also under adapters, and not by its class: remote code has another one.
            if hasattr(type(module), "expert_node"):
                module.expert_node = self.node

    def _check_biases_can_be_sharded(self) -> None:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            return
        if plugin.fsdp_version == 1:
            raise SettingsError(
                "use_router_bias=True: FSDP version 1 would convert the routers' biases to the type of the "
                "computation, where small steps get lost; set fsdp_version to 2 in the accelerate configuration."
            )
        if plugin.cpu_ram_efficient_loading:
            raise SettingsError(
                "use_router_bias=True: accelerate's fsdp_cpu_ram_efficient_loading takes the routers' biases for "
                "sharded parameters and fails; set it to false in the accelerate configuration."
            )

    def update_router_biases(self) -> None:
        """Move the selection biases by the loads of the step that has just ended, over all processes."""
        selected = self._router_statistics.selected
        # A step that fp16 skipped for its overflow moves nothing, but its loads are done with.
        if not self.accelerator.optimizer_step_was_skipped:
            loads = self.accelerator.reduce(selected - self._counted_loads, reduction="sum")
            self.accelerator.unwrap_model(self.model).update_router_biases(loads)
        self._counted_loads = selected.clone()

    @contextmanager
    def _not_timed(self) -> Iterator[None]:
        """Leave what happens inside out of `tokens_per_second`."""
        if self.args.device.type not in ("cpu", "mps"):
            # The training step before may still be running.
            torch.accelerator.synchronize()
        start = time.perf_counter()
        yield
        if self._clock_start is not None:
            self._clock_start += time.perf_counter() - start

    def _save_checkpoint(self, *args, **kwargs):
        with self._not_timed():
            return super()._save_checkpoint(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if self.lr_scheduler is not None or self.args.lr_scheduler_type != SchedulerType.CONSTANT_WITH_WARMUP:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = step_decay_schedule(
            self.optimizer if optimizer is None else optimizer,
            num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
            num_training_steps=num_training_steps,
            decay_points=self.args.lr_decay_points,
            decay_factor=self.args.lr_decay_factor,
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            # The mean over this micro-batch, whatever other processes hold: sums are formed below.
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            if getattr(outputs, "router_loss", None) is not None:
                loss = loss - outputs.router_loss
            self._add_eval_loss(loss, inputs)
        else:
            if self._clock_start is None:
                self._clock_start = time.perf_counter()
            if self.moe_layers:
                inputs = {**inputs, "output_router_logits": True}
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            self._add_router_figures(outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _add_router_figures(self, outputs: Any, inputs: dict[str, torch.Tensor]) -> None:
        """Add a micro-batch to the sums, on the device: nothing waits for it."""
        num_targets = _num_targets(inputs)
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
        reduced = self.accelerator.reduce(sums, reduction="sum")
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

    @torch.no_grad()
    def _add_eval_loss(self, loss: torch.Tensor, inputs: dict[str, torch.Tensor]) -> None:
        num_targets = _num_targets(inputs)
        # Blocks that only fill up a batch have no targets, and a mean over none is not a number.
        self._eval_sums[0] += torch.where(num_targets > 0, loss * num_targets, 0.0)
        self._eval_sums[1] += num_targets

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """As in [`Trainer`], with the mean loss over all targets and its perplexity.

        Transformers' own mean is over batches, and counts an incomplete one like the others.
        """
        self._eval_sums = torch.zeros(2, device=self.args.device, dtype=sum_dtype(self.args.device))
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss_sum, num_targets = self.accelerator.reduce(self._eval_sums, reduction="sum").tolist()
        loss = loss_sum / max(num_targets, 1)
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(loss)
        self._num_eval_targets = num_targets
        return output

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self._not_timed():
            return self._evaluate_domains(*args, **kwargs)

    def _evaluate_domains(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        eval_sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(eval_sets, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics, loss_sum, num_targets = {}, 0.0, 0.0
        for domain in eval_sets:
            prefix = f"{metric_key_prefix}_{domain}"
            metrics.update(super().evaluate(eval_sets[domain], ignore_keys, prefix))
            loss_sum += metrics[f"{prefix}_loss"] * self._num_eval_targets
            num_targets += self._num_eval_targets
        loss = loss_sum / num_targets
        overall = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(loss)}
        self.log(dict(overall))
        return {**metrics, **overall}


def _num_targets(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return how many tokens are predicted."""
    return (inputs["labels"][..., 1:] != IGNORED_LABEL).sum()


class _RouterBiasCallback(TrainerCallback):
    """Moves the routers' biases after each optimizer step."""

    def __init__(self, trainer: UpcyclingTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.update_router_biases()
