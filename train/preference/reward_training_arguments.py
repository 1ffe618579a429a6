"""trl's RewardConfig with this recipe's defaults."""

import math
from dataclasses import dataclass

from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import RewardConfig

from ...common.settings import SettingsError
from .reward_arguments import RewardRecipeArguments
from .whole_models import WholeModelMixin


SAMPLING_STRATEGIES = ("random", "sequential")


@dataclass
class RewardTrainingArguments(WholeModelMixin, RewardRecipeArguments, RewardConfig):
    """[`trl.RewardConfig`]; the fields of [`RewardRecipeArguments`] are new or have another default.

    Raises:
        SettingsError: for what a run cannot do.
    """

    def __post_init__(self):
        self.eval_strategy = self.eval_strategy or "no"
        self.settle_gradient_checkpointing()
        self._check_device()
        super().__post_init__()
        if self.train_sampling_strategy not in SAMPLING_STRATEGIES:
            raise SettingsError(
                f"train_sampling_strategy={self.train_sampling_strategy}: choose one of "
                f"{', '.join(SAMPLING_STRATEGIES)}; a pair has two lengths."
            )
        self.check_whole("Training a reward model")

    def _check_device(self) -> None:
        if self.bf16 and not self.use_cpu and not has_bfloat16():
            raise SettingsError(
                "bf16=true, but no accelerator that computes in it is there; give use_cpu=true bf16=false to train on "
                "a CPU."
            )
        if self.fp16 and self.use_cpu:
            raise SettingsError("fp16=true has no effect on a CPU; leave it out.")

    def set_num_steps(self, num_pairs: int) -> None:
        """Set `max_steps` to the steps of `num_train_epochs` over `num_pairs`, unless it is given.

        Raises:
            SettingsError: if the pairs make no batch.
        """
        steps_per_epoch = self.steps_per_epoch(num_pairs)
        if self.max_steps < 1:
            self.max_steps = math.ceil(self.num_train_epochs * steps_per_epoch)

    def steps_per_epoch(self, num_pairs: int) -> int:
        """Return the optimizer steps of one pass over `num_pairs`.

        Raises:
            SettingsError: if the pairs make no batch.
        """
        rounded = math.floor if self.dataloader_drop_last else math.ceil
        num_batches = rounded(num_pairs / (self.per_device_train_batch_size * self.world_size))
        if not num_batches:
            raise SettingsError(
                f"dataloader_drop_last=true leaves nothing to train on: {num_pairs:,} pairs make no batch of "
                f"per_device_train_batch_size={self.per_device_train_batch_size} on each of {self.world_size} "
                "processes; leave it out, lower the batch size, or give more pairs."
            )
        return math.ceil(num_batches / self.gradient_accumulation_steps)


def has_bfloat16() -> bool:
    """Return whether there is an accelerator that computes in bfloat16."""
    return is_torch_bf16_gpu_available() or is_torch_xla_available()
