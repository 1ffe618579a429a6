"""The DPO of one round."""

import copy
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOTrainer

from ..messages import tell
from ..saving.checkpoints import checkpoint_folders, fault_of
from ..saving.mixin import SavingMixin
from .dpo_training_arguments import DPOTrainingArguments
from .router_losses import RouterLossMixin


class RoundTrainer(RouterLossMixin, SavingMixin, DPOTrainer):
    """[`trl.DPOTrainer`] on pairs that are tokenized, and have the reference's log-probabilities, already.

    The losses of routers are added as their model adds them.
    """

    # No step is left out here.
    num_skipped_in_a_row = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.set_up_saving()
        self.set_up_router_losses()

    def _prepare_dataset(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return dataset

    @contextmanager
    def not_timed(self):
        """Do nothing: speed is not measured here."""
        yield

    def add_routing(self, inputs: Mapping[str, Any], outputs: Any, losses: Mapping[str, Any]) -> None:
        """Have the log show what the router losses add, and the balance."""
        for name in ("router_loss", "aux_loss"):
            self._metrics["train"][name].append(losses[name].item())

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
    """
    args = copy.copy(args)
    args.output_dir, args.seed = str(folder), seed
    trainer = RoundTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_TellCallback(name))
    trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
    # Counts and times of what a process did are others where it went on with what another had begun.
    log = [
        {name: value for name, value in log.items() if name != "num_tokens"}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    return TrainedRound(trainer.state.global_step, log)


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
