"""How a model is spread over processes: what the launcher offers, and what Transformers does as it loads.

Whole copies (DDP), shards (FSDP2, hybrid sharding, ZeRO-3) and parts of a sequence (context parallelism) are settings
of the launcher, in `configs/accelerate/`. Tensor and expert parallelism, which shard the model as it is loaded, are
settings of a run: see [`EngineArguments`].
"""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import strtobool

from ..common.settings import SettingsError
from .arguments import DataArguments, EngineArguments
from .checks import (
    batches_at_a_time,
    check_context_parallelism,
    check_dimensions,
    check_least_values,
    check_sharding_at_load,
)


# The folder that fully sharded optimizers of Accelerate are in too, whose `.metadata` is written last.
OPTIMIZER_FOLDER = "optimizer_0"
# It names the folder beside it that holds what DeepSpeed's processes go on from.
DEEPSPEED_FILE = "latest"


def launcher_size(dimension: str) -> int:
    """Return the size that the launcher gave a dimension of Accelerate's `parallelism_config`, such as `cp`."""
    if not strtobool(os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false")):
        return 1
    return int(os.environ.get(f"PARALLELISM_CONFIG_{dimension.upper()}_SIZE", "1"))


def data_parallel_size(args: TrainingArguments) -> int:
    """Return how many processes, or groups of them, have batches of their own."""
    return batches_at_a_time(args.world_size, args.tensor_parallel_size, launcher_size("cp"))


def shards_at_load(args: EngineArguments) -> bool:
    """Return whether Transformers shards the model as it is loaded."""
    return args.tensor_parallel_size > 1 or args.expert_parallel_size > 1


def lay_out_processes(args: TrainingArguments, data_args: DataArguments) -> None:
    """Prepare `args` for the layout of processes that they and the launcher say.

    Raises:
        SettingsError: if the processes that were started, or the blocks of `data_args`, do not suit it.
    """
    check_least_values(vars(args))
    sizes = {dimension: launcher_size(dimension) for dimension in ("dp_replicate", "dp_shard", "cp", "tp", "sp")}
    check_dimensions(sizes, args.world_size)
    check_context_parallelism(sizes["cp"], data_args.block_size, data_args.document_mask)
    if shards_at_load(args):
        _check_sharding_at_load(args)
    if args.fsdp or strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        # Otherwise each process holds the gradients of all weights from one micro-batch of a step to the next.
        options = args.accelerator_config.gradient_accumulation_kwargs or {}
        args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True, **options}
    if data_parallel_size(args) < args.world_size:
        # Otherwise Accelerate's first process reads for all, and gives each one a batch of its own.
        args.accelerator_config.dispatch_batches = False


def _check_sharding_at_load(args: TrainingArguments) -> None:
    if "ep_size" not in {field.name for field in fields(DistributedConfig)}:
        raise SettingsError(
            f"tensor_parallel_size={args.tensor_parallel_size}, expert_parallel_size={args.expert_parallel_size} "
            "needs a newer Transformers (5.23 has it): pip install -U transformers."
        )
    check_sharding_at_load(
        args.tensor_parallel_size,
        args.expert_parallel_size,
        args.world_size,
        has_engine=bool(args.fsdp)
        or any(
            strtobool(os.environ.get(f"ACCELERATE_USE_{engine}", "false"))
            for engine in ("FSDP", "DEEPSPEED", "PARALLELISM_CONFIG")
        ),
        load_best_model_at_end=args.load_best_model_at_end,
    )


def distributed_config(args: TrainingArguments) -> DistributedConfig | None:
    """Return how Transformers shards the model as it is loaded, or None if the launcher decides.

    Processes that tensor parallelism leaves over shard the dense weights and, where there are several copies of an
    expert, the experts (FSDP2).
    """
    if not shards_at_load(args):
        return None
    return DistributedConfig(
        tp_size=args.tensor_parallel_size,
        ep_size=args.expert_parallel_size,
        fsdp_size=args.world_size // args.tensor_parallel_size,
    )


def weights_at_load(args: TrainingArguments, checkpoint: str | None) -> str | None:
    """Return `checkpoint` if its weights have to be there as the model is loaded, and sharded; else None."""
    return checkpoint if shards_at_load(args) else None


class EnginesMixin:
    """Counts a batch once that several processes share, and saves and resumes models that are sharded at load."""

    def __init__(self, model=None, args=None, *others, **kwargs):
        if args is None:
            raise TypeError("args is missing; give UpcyclingTrainingArguments.")
        # Transformers' Trainer refuses checkpoints of such a model with an optimizer, as it cannot load one.
        save_only_model = args.save_only_model
        args.save_only_model = save_only_model or shards_at_load(args)
        super().__init__(model, args, *others, **kwargs)
        args.save_only_model = save_only_model

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.accelerator.ddp_handler is not None:
            # Gradients are not held twice, in the weights and in the buckets that are sent.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or plugin.fsdp_version != 2:
            return
        if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
            # Losses stay float32: Accelerate's policy rounds all that a layer or the model returns.
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
        if plugin.cpu_ram_efficient_loading:
            self.accelerator.prepare = _keeping_buffers(self.accelerator.prepare)

    def sum_over_batches(self, sums: torch.Tensor) -> torch.Tensor:
        """Return `sums` added up over processes, those of a batch that several of them share once."""
        return self.accelerator.reduce(sums, reduction="sum") / self.args.tensor_parallel_size

    def compute_loss(self, model, inputs, *args, **kwargs):
        if launcher_size("cp") > 1:
            # Ring attention is causal by itself. The model would take a part of a sequence for packed documents, and
            # build a mask of them.
            inputs = {**inputs, "attention_mask": {"full_attention": None}}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not shards_at_load(self.args):
            return super()._save_optimizer_and_scheduler(output_dir)
        from transformers.distributed.checkpoint import save_optimizer_distributed

        save_optimizer_distributed(self.model, self.optimizer.optimizer, str(Path(output_dir, OPTIMIZER_FOLDER)))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The model was loaded from there, sharded: see `weights_at_load`.
        if not shards_at_load(self.args):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not shards_at_load(self.args):
            return super()._load_optimizer_and_scheduler(checkpoint)
        from transformers.distributed.checkpoint import load_optimizer_distributed

        load_optimizer_distributed(self.model, self.optimizer.optimizer, str(Path(checkpoint, OPTIMIZER_FOLDER)))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))


def _keeping_buffers(prepare: Callable) -> Callable:
    """Return Accelerate's `prepare` such that buffers that are saved get their values from the first process.

    With `fsdp_cpu_ram_efficient_loading` only that process has loaded the model. Accelerate 1.15 brings parameters to
    the others, and takes such buffers for sharded parameters; those that are not saved it leaves as they are.
    """

    @wraps(prepare)
    def prepare_with_buffers(*args, **kwargs):
        models = [arg for arg in args if isinstance(arg, nn.Module)]
        saved = [
            (module, name)
            for model in models
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]
        for module, name in saved:
            module._non_persistent_buffers_set.add(name)
        prepared = prepare(*args, **kwargs)
        for module, name in saved:
            module._non_persistent_buffers_set.discard(name)
            torch.distributed.broadcast(module._buffers[name], src=0)
        return prepared

    return prepare_with_buffers
