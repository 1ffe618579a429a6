"""trl's RewardConfig with this recipe's defaults."""

import math
from dataclasses import dataclass

from trl import RewardConfig

from ...common.settings import SettingsError
from .reward_arguments import RewardRecipeArguments


@dataclass
class RewardTrainingArguments(RewardRecipeArguments, RewardConfig):
    """[`trl.RewardConfig`]; the fields of [`RewardRecipeArguments`] are new or have another default.

    Raises:
        SettingsError: for what a run cannot do.
    """

    # Whole copies of the model only.
    tensor_parallel_size = 1
    expert_parallel_size = 1

    def __post_init__(self):
        self.eval_strategy = self.eval_strategy or "no"
        self.gradient_checkpointing_kwargs = {"use_reentrant": False, **(self.gradient_checkpointing_kwargs or {})}
        if hasattr(self, "activation_checkpointing"):
            # The names that newer Transformers reads.
            self.activation_checkpointing = self.gradient_checkpointing
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        super().__post_init__()
        if self.gradient_checkpointing_kwargs["use_reentrant"]:
            raise SettingsError(
                "gradient_checkpointing_kwargs: use_reentrant=true would cut router losses off from what is before "
                "the routers; leave it out."
            )
        if self.deepspeed or self.fsdp or self.distributed_state.distributed_type in ("FSDP", "DEEPSPEED"):
            raise SettingsError(
                "Training a reward model needs a whole model on each device: several processes with DDP, no FSDP or "
                "DeepSpeed."
            )

    def set_num_steps(self, num_pairs: int) -> None:
        """Set `max_steps` to the steps of `num_train_epochs` over `num_pairs`, unless it is given."""
        if self.max_steps < 1:
            num_batches = math.ceil(num_pairs / (self.per_device_train_batch_size * self.world_size))
            num_steps = math.ceil(num_batches / self.gradient_accumulation_steps)
            self.max_steps = math.ceil(self.num_train_epochs * num_steps)
