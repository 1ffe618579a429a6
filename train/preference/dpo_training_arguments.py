"""trl's DPOConfig with this recipe's defaults."""

from dataclasses import dataclass

from trl import DPOConfig

from ...common.settings import SettingsError
from .dpo_arguments import DPOArguments


@dataclass
class DPOTrainingArguments(DPOArguments, DPOConfig):
    """[`trl.DPOConfig`] for a round; the fields of [`DPOArguments`] have another default.

    Raises:
        SettingsError: for what the rounds cannot do.
    """

    # Whole copies of the model only.
    tensor_parallel_size = 1
    expert_parallel_size = 1

    def __post_init__(self):
        # The reference's log-probabilities are computed before, so that no round holds two models.
        self.precompute_ref_log_probs = True
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
                "Iterative DPO needs a whole model on each device: several processes with DDP, no FSDP or DeepSpeed."
            )
