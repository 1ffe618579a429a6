"""Transformers' TrainingArguments with this recipe's fields and defaults."""

import importlib.util
import math
from dataclasses import dataclass

from transformers import SchedulerType, TrainingArguments

from ..common.settings import SettingsError
from .arguments import EngineArguments, MonitoringArguments, RecipeArguments
from .engines import data_parallel_size


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
        super().__post_init__()
        self._check_schedule()
        self._check_monitoring()
        self._settle_gradient_checkpointing()
        self._check_optimizer()
        if self.expected_processes is not None and self.expected_processes != self.world_size:
            raise SettingsError(
                f"expected_processes={self.expected_processes}, but {self.world_size} started; "
                "`accelerate launch --cpu` starts one whatever --num_processes says; leave --cpu out and set "
                "use_cpu=true."
            )
        if self.save_only_model and self.resume_from_checkpoint is not None:
            raise SettingsError(
                f"resume_from_checkpoint={self.resume_from_checkpoint}, but save_only_model=true keeps no optimizer "
                "to go on with; leave one of them out."
            )
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

    def _check_schedule(self):
        for name in ("router_learning_rate", "router_warmup_steps", "max_skipped_steps"):
            if (getattr(self, name) or 0) < 0:
                raise SettingsError(f"{name}={getattr(self, name):g} is negative; give 0 or more.")
        if self.lr_scheduler_type != SchedulerType.CONSTANT_WITH_WARMUP and self.lr_decay_points:
            raise SettingsError(
                f"lr_scheduler_type={self.lr_scheduler_type.value!r} decays in its own way and takes no "
                "lr_decay_points; set lr_decay_points=[]."
            )
        outside = [point for point in self.lr_decay_points if not 0 <= point <= 1]
        if outside:
            raise SettingsError(f"lr_decay_points holds {outside}; they are shares of max_steps, from 0 to 1.")
        if self.lr_scheduler_type != SchedulerType.CONSTANT_WITH_WARMUP and self.router_warmup_steps:
            raise SettingsError(
                f"router_warmup_steps={self.router_warmup_steps:g} needs lr_scheduler_type='constant_with_warmup', "
                f"not {self.lr_scheduler_type.value!r}."
            )
        num_held_steps, num_warmup_steps = self.get_router_warmup_steps(), self.get_warmup_steps(self.max_steps)
        last_step = num_held_steps + num_warmup_steps
        first_decay_step = round(min(self.lr_decay_points, default=1.0) * self.max_steps)
        if self.lr_decay_points and last_step > first_decay_step:
            held = f"router_warmup_steps={self.router_warmup_steps:g} and " if num_held_steps else ""
            raise SettingsError(
                f"{held}warmup_steps={self.warmup_steps:g}: the warm-up takes {last_step} steps, but with max_steps="
                f"{self.max_steps} the learning rate decays from step {first_decay_step} on; "
                "give a share below 1, or train for longer."
            )

    def _check_monitoring(self):
        for name in ("router_probe_tokens", "router_probe_steps"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise SettingsError(f"{name}={value} is negative; give a number from 0, which turns it off.")
        if not 0 <= self.router_collapse_threshold <= 1:
            raise SettingsError(
                f"router_collapse_threshold={self.router_collapse_threshold:g} must be from 0 (never) to 1."
            )
        if self.peak_flops_per_device is not None and self.peak_flops_per_device <= 0:
            raise SettingsError(
                f"peak_flops_per_device={self.peak_flops_per_device:g} must be above 0, such as 989e12; or leave it "
                "out."
            )

    def get_router_warmup_steps(self) -> int:
        """Return the number of first steps that train the routers only."""
        share = self.router_warmup_steps
        return int(share) if share >= 1 else math.ceil(share * self.max_steps)

    def set_tokens_per_step(self, block_size: int) -> None:
        """Set `gradient_accumulation_steps` so that a step takes `tokens_per_step` tokens, if that is given.

        Raises:
            SettingsError: if no number of micro-batches makes them, or both are given.
        """
        if self.tokens_per_step is None:
            return
        if self.gradient_accumulation_steps != 1:
            raise SettingsError(
                f"tokens_per_step={self.tokens_per_step} and gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} say the same thing; give one of them."
            )
        num_batches = data_parallel_size(self)
        micro_batch_tokens = block_size * self.per_device_train_batch_size * num_batches
        if self.tokens_per_step < 1 or self.tokens_per_step % micro_batch_tokens:
            raise SettingsError(
                f"tokens_per_step={self.tokens_per_step} is not a multiple of {micro_batch_tokens} = block_size x "
                f"per_device_train_batch_size x processes = {block_size} x {self.per_device_train_batch_size} x "
                f"{num_batches}."
            )
        self.gradient_accumulation_steps = self.tokens_per_step // micro_batch_tokens
