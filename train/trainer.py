"""The Trainer, with the router's figures in its log, this recipe's schedule, and perplexity by domain."""

import math
import time
from typing import Any

import torch
from transformers import SchedulerType, Trainer
from transformers.trainer_utils import EvalLoopOutput

from modeling_upcycled_moe.losses_upcycled_moe import token_weights

from ..common.routing import RouterStatistics
from .data import IGNORED_LABEL, collate_blocks
from .metrics import mean_over_layers, router_log
from .schedule import step_decay_schedule


class UpcyclingTrainer(Trainer):
    """[`Trainer`] for upcycled MoE checkpoints, and for dense ones, which have no router figures.

    It logs, at each of `logging_steps`, means over the tokens of all steps since the last log:

    * `lm_loss`: `loss` without the router losses.
    * `router/aux_loss`, `router/z_loss`: router losses, not weighted, mean over layers.
    * `router/layer_NN/...`: the figures of `common/routing.py` for each MoE layer, with the load of each expert as
      `load/expert_NN`; `router/...`: their means over layers.
    * `tokens_per_second`: over all processes.

    and at each evaluation `eval_<domain>_loss` and `_perplexity` of the language-modeling loss alone, with `eval_loss`
    and `eval_perplexity` over the tokens of all domains.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, data_collator=kwargs.pop("data_collator", collate_blocks), **kwargs)
        # Dense models have no MoE layers. The class is not asked for: remote code would be another one.
        self.moe_layers = list(getattr(self.model.config, "moe_layers", []))
        self._eval_sums = torch.zeros(2)
        self._reset_train_sums()

    def _reset_train_sums(self) -> None:
        device = self.args.device
        # Targets, and the sums over targets of the two router losses.
        self._train_sums = torch.zeros(3, device=device)
        self._router_statistics = RouterStatistics(
            len(self.moe_layers), getattr(self.model.config, "num_experts", 0) if self.moe_layers else 0, device
        )
        self._last_log_time = time.perf_counter()

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
        self._train_sums[0] += num_targets
        if not self.moe_layers:
            return
        self._train_sums[1] += outputs.aux_loss * num_targets
        self._train_sums[2] += outputs.z_loss * num_targets
        weights = token_weights(inputs.get("attention_mask"), inputs["input_ids"].numel())
        self._router_statistics.update(outputs.router_logits, self.model.config.num_experts_per_tok, weights)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Of all that is logged only the log of training steps has this key.
        if "loss" in logs:
            logs.update(self._train_log(logs["loss"]))
        super().log(logs, start_time)

    def _train_log(self, loss: float) -> dict[str, float]:
        """Return the figures since the last log, over all processes, and begin anew."""
        sums = self._train_sums.to(self._router_statistics.selected.dtype)
        reduced = self.accelerator.reduce(torch.cat([sums, self._router_statistics.flatten()]), reduction="sum")
        num_targets, aux_loss, z_loss = reduced[:3].tolist()
        statistics = self._router_statistics.unflatten(reduced[3:])
        seconds = time.perf_counter() - self._last_log_time
        self._reset_train_sums()
        logs = {"lm_loss": loss, "tokens_per_second": num_targets / seconds}
        if not self.moe_layers:
            return logs
        aux_loss, z_loss = aux_loss / max(num_targets, 1), z_loss / max(num_targets, 1)
        config = self.model.config
        logs["lm_loss"] = loss - config.router_aux_loss_coef * aux_loss - config.router_z_loss_coef * z_loss
        layers = dict(zip(self.moe_layers, statistics.metrics(), strict=True))
        return {
            **logs,
            "router/aux_loss": aux_loss,
            "router/z_loss": z_loss,
            **mean_over_layers(layers),
            **router_log(layers),
        }

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
        self._eval_sums = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss_sum, num_targets = self.accelerator.reduce(self._eval_sums, reduction="sum").tolist()
        loss = loss_sum / max(num_targets, 1)
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        output.metrics[f"{metric_key_prefix}_perplexity"] = math.exp(loss)
        self._num_eval_targets = num_targets
        return output

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
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
