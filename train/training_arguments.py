"""Transformers' TrainingArguments with this recipe's fields and defaults."""

import importlib.util
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from ..common.settings import SettingsError
from .arguments import EngineArguments, MonitoringArguments, RecipeArguments
from .checks import accumulation_steps, check_monitoring, check_num_processes, check_schedule, settled_decay_points
from .engines import data_parallel_size
from .saving.pushing import check_hub_settings


# How the names of optimizers begin that are in a package of their own.
OPTIMIZER_PACKAGES = {
    "bitsandbytes": ("adamw_bnb", "adamw_8bit", "ademamix", "lion", "paged", "rmsprop_bnb"),
    "torchao": ("adamw_torch_8bit", "adamw_torch_4bit"),
}


@dataclass
class UpcyclingTrainingArguments(RecipeArguments, EngineArguments, MonitoringArguments, TrainingArguments):
    """[`TrainingArguments`]; the fields of the other groups it is made of are new or have another default.

    Raises:
        SettingsError: for fields that exclude each other.
    """

    def __post_init__(self):
        # Made by hand, these have no settings that they could follow from.
        self.eval_strategy = self.eval_strategy or "no"
        self.report_to = self.report_to or "none"
        super().__post_init__()
        check_schedule(self)
        self.lr_decay_points = settled_decay_points(self)
        check_monitoring(self)
        check_num_processes(self.expected_processes, self.world_size)
        check_hub_settings(self)
        self._settle_gradient_checkpointing()
        self._check_optimizer()
        if self.save_only_model and self.resume_from_checkpoint is not None:
            raise SettingsError(
                f"resume_from_checkpoint={self.resume_from_checkpoint}, but save_only_model=true keeps no optimizer "
                "to go on with; leave one of them out."
            )
        if self.label_smoothing_factor:
            raise SettingsError(
                f"label_smoothing_factor={self.label_smoothing_factor:g}: the models compute their loss themselves, "
                "without it; leave it out."
            )
        if self.fp16 and self.use_cpu:
            raise SettingsError("fp16=true has no effect on a CPU; leave it out, or set bf16=true.")
        if self.enable_jit_checkpoint:
            raise SettingsError(
                "enable_jit_checkpoint=true: every run here saves and stops on SIGTERM and SIGUSR1, all its processes "
                "after the same step; leave it out."
            )
        if self.dataloader_num_workers > 1:
            raise SettingsError(
                f"dataloader_num_workers={self.dataloader_num_workers}: each worker would read all of the text; "
                "use 0, or 1 to read ahead."
            )

    @property
    def device(self) -> torch.device:
        """As in [`TrainingArguments`]; a CPU without a number, of which older releases cannot load an optimizer."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def _check_optimizer(self):
        for package, names in OPTIMIZER_PACKAGES.items():
            if self.optim.startswith(names) and importlib.util.find_spec(package) is None:
                raise SettingsError(
                    f"optim={self.optim.value} needs {package}, which is not installed: pip install "
                    "'upcycled-moe[optimizers]'."
                )

    def _settle_gradient_checkpointing(self):
        if not self.gradient_checkpointing:
            return
        options = {"use_reentrant": False, **(self.gradient_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise SettingsError(
                "gradient_checkpointing_kwargs: use_reentrant=true would cut router losses off from what is before "
                "the routers; leave it out."
            )
        self.gradient_checkpointing_kwargs = options
        if hasattr(self, "activation_checkpointing_kwargs"):
            # The name that newer Transformers reads.
            self.activation_checkpointing_kwargs = options

    def set_tokens_per_step(self, block_size: int) -> None:
        """Set `gradient_accumulation_steps` so that a step takes `tokens_per_step` tokens, if that is given.

        Raises:
            SettingsError: if no number of micro-batches makes them, or both are given.
        """
        self.gradient_accumulation_steps = accumulation_steps(
            self.tokens_per_step,
            self.gradient_accumulation_steps,
            block_size,
            self.per_device_train_batch_size,
            data_parallel_size(self),
        )
