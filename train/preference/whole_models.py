"""Arguments of training where each device holds a whole model."""

from ...common.settings import SettingsError


class WholeModelMixin:
    """Training arguments that shard nothing, and checkpoint activations such that router losses keep gradients."""

    tensor_parallel_size = 1
    expert_parallel_size = 1

    def settle_gradient_checkpointing(self) -> None:
        """Set the options of it, before Transformers' own checks.

        Raises:
            SettingsError: for the reentrant kind.
        """
        self.gradient_checkpointing_kwargs = {"use_reentrant": False, **(self.gradient_checkpointing_kwargs or {})}
        if self.gradient_checkpointing_kwargs["use_reentrant"]:
            raise SettingsError(
                "gradient_checkpointing_kwargs: use_reentrant=true would cut router losses off from what is before "
                "the routers; leave it out."
            )
        if hasattr(self, "activation_checkpointing"):
            # The names that newer Transformers reads.
            self.activation_checkpointing = self.gradient_checkpointing
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs

    def check_whole(self, what: str) -> None:
        """Check that nothing shards the model, after Transformers' own checks; errors say it of `what`.

        Raises:
            SettingsError: if something does.
        """
        if self.deepspeed or self.fsdp or self.distributed_state.distributed_type in ("FSDP", "DEEPSPEED"):
            raise SettingsError(
                f"{what} needs a whole model on each device: several processes with DDP, no FSDP or DeepSpeed."
            )
