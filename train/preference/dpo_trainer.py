"""The DPO of one round.

Dimensions: L MoE layers, E experts to choose from.
"""

import copy
import math
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOTrainer

from modeling_upcycled_moe.losses_upcycled_moe import computed_losses, token_weights

from ...common.routing import RouterStatistics
from ..balancing import BalancingMixin
from ..errors import RunError
from ..messages import tell
from ..saving.checkpoints import checkpoint_folders, fault_of
from ..saving.mixin import SavingMixin
from .dpo_training_arguments import DPOTrainingArguments
from .router_losses import RouterLossMixin


class RoundTrainer(SavingMixin, BalancingMixin, RouterLossMixin, DPOTrainer):
    """[`trl.DPOTrainer`] on pairs that are tokenized, and have the reference's log-probabilities, already.

    The losses of routers are added as their model adds them, and routers with biases have them follow the loads.
    """

    way_to_go_on = "the same command goes on"
    # No step is left out here.
    num_skipped_in_a_row = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.set_up_saving()
        self.set_up_router_losses()
        self.loss_names = computed_losses(self._routed_model.config) if self.moe_layers else []
        self._reset_step_loads()
        self.set_up_balancing()

    def _prepare_dataset(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return dataset

    @contextmanager
    def not_timed(self):
        """Do nothing: speed is not measured here."""
        yield

    def add_routing(self, inputs: Mapping[str, Any], outputs: Any, losses: Mapping[str, Any]) -> None:
        """Have the log show what the router losses add, and the balance; count the loads where biases follow them."""
        for name in ("router_loss", "aux_loss"):
            self._metrics["train"][name].append(losses[name].item())
        config = self._routed_model.config
        if config.use_router_bias:
            weights = token_weights(inputs.get("attention_mask"), outputs.router_logits[0].shape[0])
            self._step_loads.update(outputs.router_logits, outputs.selected_experts, config, weights)

    def _reset_step_loads(self) -> None:
        num_experts = self._routed_model.config.num_routed_experts if self.moe_layers else 0
        self._step_loads = RouterStatistics(len(self.moe_layers), num_experts, self.args.device)

    def take_step_loads(self) -> torch.Tensor:
        """Return how often each expert was selected in this process since the last call [L, E]."""
        loads = self._step_loads.selected
        self._reset_step_loads()
        return loads

    def sum_over_batches(self, sums: torch.Tensor) -> torch.Tensor:
        """Return `sums` added up over processes."""
        return self.accelerator.reduce(sums, reduction="sum")

    @property
    def step_was_skipped(self) -> bool:
        """Whether the step that has just ended left the weights as they were."""
        return self.accelerator.optimizer_step_was_skipped

    def create_model_card(self, *args, **kwargs) -> None:
        """Write no card of trl's: the policy gets one that tells of all that came before."""


class TrainedRound(NamedTuple):
    """What training a policy did.

    Args:
        num_steps: of the optimizer.
        log: figures by step.
    """

    num_steps: int
    log: list[dict[str, Any]]


def train_round(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    args: DPOTrainingArguments,
    folder: Path,
    seed: int,
    name: str,
) -> TrainedRound:
    """Train `model` on `pairs` in place; goes on from the newest checkpoint in `folder`.

    Args:
        pairs: columns `prompt_ids`, `chosen_ids`, `rejected_ids`, `ref_chosen_logps` and `ref_rejected_logps`.
        seed: of the order of the pairs.
        name: of the round, for what is shown.

    Raises:
        RunEnded: if a signal asked to stop; a checkpoint of the last step stands.
        RunError: if weights end up not finite.
    """
    args = copy.copy(args)
    args.output_dir, args.seed = str(folder), seed
    trainer = RoundTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_TellCallback(name))
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise RunError(
            f"{name}: the weights are not finite after training, so no policy is saved; begin anew in another "
            "output_dir, with a lower learning_rate."
        )
    # Counts and times of what a process did are others where it went on with what another had begun.
    log = [
        {name: _finite(value) for name, value in log.items() if name != "num_tokens"}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    return TrainedRound(trainer.state.global_step, log)


def _finite(value: Any) -> Any:
    """Return None for a number that JSON has not: with fp16 gradients overflow at first, and their norm."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint in `folder`, or None."""
    whole = (path for path in reversed(checkpoint_folders(folder)) if fault_of(path) is None)
    return next(map(str, whole), None)


class _TellCallback(TrainerCallback):
    """A line on stderr at each log."""

    def __init__(self, name: str):
        self.name = name

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and "loss" in logs:
            figures = {"loss": logs["loss"], "accuracy": logs["rewards/accuracies"], "margin": logs["rewards/margins"]}
            shown = ", ".join(f"{figure} {value:.4f}" for figure, value in figures.items())
            tell(f"{self.name}: step {state.global_step} of {state.max_steps}: {shown}")
