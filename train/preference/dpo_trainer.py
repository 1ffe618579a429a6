"""The DPO of one round."""

import copy
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOTrainer

from ..saving.checkpoints import checkpoint_folders, fault_of
from ..saving.mixin import SavingMixin
from .dpo_training_arguments import DPOTrainingArguments


class RoundTrainer(SavingMixin, DPOTrainer):
    """[`trl.DPOTrainer`] on pairs that are tokenized, and have the reference's log-probabilities, already."""

    # No step is left out here.
    num_skipped_in_a_row = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.set_up_saving()

    def _prepare_dataset(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return dataset

    @contextmanager
    def not_timed(self):
        """Do nothing: speed is not measured here."""
        yield

    def create_model_card(self, *args, **kwargs) -> None:
        """Write no card of trl's: the policy gets one that tells of all that came before."""


def train_round(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    args: DPOTrainingArguments,
    folder: Path,
    seed: int,
    name: str,
) -> list[dict[str, Any]]:
    """Train `model` on `pairs` in place, and return the log; goes on from the newest checkpoint in `folder`.

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
    return trainer.state.log_history


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
            print(f"{self.name}: step {state.global_step} of {state.max_steps}: {shown}", file=sys.stderr)
