"""What the settings of a run and its number of processes have to satisfy, for the run itself and for its plan."""

import math
from collections.abc import Mapping
from typing import Any

from ..common.settings import SettingsError
from .arguments import MonitoringArguments, RecipeArguments


# A block's first token is predicted by none, so that one of a single token would teach nothing.
LEAST_VALUES = {
    "block_size": 2,
    "max_eval_blocks": 1,
    "preprocessing_num_workers": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "tokens_per_step": 1,
    "expected_processes": 1,
    "tensor_parallel_size": 1,
    "expert_parallel_size": 1,
    "num_processes": 1,
    "loss_chunk_tokens": 0,
}
NOT_NEGATIVE = (
    "learning_rate",
    "router_learning_rate",
    "router_warmup_steps",
    "lr_decay_factor",
    "max_skipped_steps",
)
CONSTANT_WITH_WARMUP = "constant_with_warmup"
# DeepSeekMoE (arXiv 2401.06066), section 4.1.
DECAY_POINTS = (0.8, 0.9)
# What the launcher cannot lay out here, with the way out.
UNSUPPORTED_DIMENSIONS = {
    "tp": "leave it out and give tensor_parallel_size as a setting of the run",
    "sp": "use parallelism_config_cp_size for long sequences",
}


def check_least_values(settings: Mapping[str, Any]) -> None:
    """Check that sizes and counts are not below the least that makes sense; null is none given.

    Raises:
        SettingsError: at the first that is.
    """
    for name, least in LEAST_VALUES.items():
        value = settings.get(name)
        if value is not None and value < least:
            allowed = "is negative; give 0 or more" if least == 0 else f"must be at least {least}"
            raise SettingsError(f"{name}={value} {allowed}.")


def check_schedule(args: RecipeArguments) -> None:
    """Check the schedule of the learning rates.

    Raises:
        SettingsError: if a part of it is out of range, or the parts exclude each other.
    """
    for name in NOT_NEGATIVE:
        if (getattr(args, name) or 0) < 0:
            raise SettingsError(f"{name}={getattr(args, name):g} is negative; give 0 or more.")
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    decay_points = settled_decay_points(args)
    if scheduler != CONSTANT_WITH_WARMUP and decay_points:
        raise SettingsError(
            f"lr_scheduler_type={scheduler!r} decays in its own way and takes no lr_decay_points; set "
            "lr_decay_points=[]."
        )
    if outside := [point for point in decay_points if not 0 <= point <= 1]:
        raise SettingsError(f"lr_decay_points holds {outside}; they are shares of max_steps, from 0 to 1.")
    if scheduler != CONSTANT_WITH_WARMUP and args.router_warmup_steps:
        raise SettingsError(
            f"router_warmup_steps={args.router_warmup_steps:g} needs lr_scheduler_type='{CONSTANT_WITH_WARMUP}', "
            f"not {scheduler!r}."
        )
    last_step = args.router_warmup_steps + settled_steps(args.warmup_steps, args.max_steps)
    end = round(min(decay_points, default=1.0) * args.max_steps)
    if args.max_steps > 0 and last_step > end:
        held = f"router_warmup_steps={args.router_warmup_steps} and " if args.router_warmup_steps else ""
        what = f"the learning rate decays from step {end} on" if decay_points else "the run ends before"
        raise SettingsError(
            f"{held}warmup_steps={args.warmup_steps:g}: the warm-up takes {last_step} steps, but with max_steps="
            f"{args.max_steps} {what}; warm up for fewer, or train for longer."
        )


def settled_decay_points(args: RecipeArguments) -> list[float]:
    """Return the shares of the steps at which the learning rate steps down."""
    if args.lr_decay_points is not None:
        return args.lr_decay_points
    scheduler = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return list(DECAY_POINTS) if scheduler == CONSTANT_WITH_WARMUP else []


def settled_steps(steps: float, max_steps: int) -> int:
    """Return the steps that a setting means: below 1 a share of `max_steps`, as Transformers reads `warmup_steps`."""
    return int(steps) if steps >= 1 else math.ceil(steps * max_steps)


def check_monitoring(args: MonitoringArguments) -> None:
    """Check what a run shows of itself.

    Raises:
        SettingsError: at the first setting that is out of range.
    """
    for name in ("router_probe_tokens", "router_probe_steps"):
        if (value := getattr(args, name)) is not None and value < 0:
            raise SettingsError(f"{name}={value} is negative; give a number from 0, which turns it off.")
    if not 0 <= args.router_collapse_threshold <= 1:
        raise SettingsError(
            f"router_collapse_threshold={args.router_collapse_threshold:g} must be from 0 (never) to 1."
        )
    if args.peak_flops_per_device is not None and args.peak_flops_per_device <= 0:
        raise SettingsError(
            f"peak_flops_per_device={args.peak_flops_per_device:g} must be above 0, such as 989e12; or leave it out."
        )


def check_num_processes(expected: int | None, num_processes: int) -> None:
    """Check that as many processes were started as are expected, if a number is.

    Raises:
        SettingsError: if not.
    """
    if expected is not None and expected != num_processes:
        raise SettingsError(
            f"expected_processes={expected}, but {num_processes} started; change num_processes of the launcher "
            "(`accelerate launch --cpu` starts one whatever it says; leave --cpu out and set use_cpu=true)."
        )


def check_dimensions(sizes: Mapping[str, int], num_processes: int) -> None:
    """Check the sizes of Accelerate's `parallelism_config`, by names such as `cp`; those left out are 1.

    Raises:
        SettingsError: if one is not supported, or together they are another number of processes.
    """
    for name, size in sizes.items():
        if size < 1:
            raise SettingsError(f"parallelism_config_{name}_size={size} must be at least 1.")
        if size > 1 and name in UNSUPPORTED_DIMENSIONS:
            raise SettingsError(
                f"parallelism_config_{name}_size={size} is not supported here; {UNSUPPORTED_DIMENSIONS[name]}."
            )
    supported = {name: sizes.get(name, 1) for name in ("dp_replicate", "dp_shard", "cp")}
    if (product := math.prod(supported.values())) > 1 and product != num_processes:
        shown = " x ".join(f"{name}={size}" for name, size in supported.items())
        raise SettingsError(
            f"The accelerate configuration lays out {shown} = {product} processes, but {num_processes} started; "
            "change num_processes or the sizes of its parallelism_config."
        )


def check_context_parallelism(num_parts: int, block_size: int, document_mask: bool) -> None:
    """Check that blocks can be cut into `num_parts`.

    Raises:
        SettingsError: if not.
    """
    if num_parts == 1:
        return
    # Each process takes a part from the front and one from the back, so that all have as many pairs to attend to.
    if block_size % (2 * num_parts):
        raise SettingsError(
            f"block_size={block_size} cannot be cut by parallelism_config_cp_size={num_parts}; give a multiple of "
            f"{2 * num_parts}."
        )
    if document_mask:
        raise SettingsError(
            f"document_mask=true does not go with parallelism_config_cp_size={num_parts}, whose attention knows no "
            "bounds of documents; set document_mask=false."
        )


def check_sharding_at_load(
    tensor_size: int, expert_size: int, num_processes: int, *, has_engine: bool, load_best_model_at_end: bool
) -> None:
    """Check sizes of tensor and expert parallelism, one of them above 1.

    Args:
        has_engine: whether the launcher shards the model too.

    Raises:
        SettingsError: if they do not go together, or with the rest.
    """
    given = f"tensor_parallel_size={tensor_size}, expert_parallel_size={expert_size}"
    if has_engine:
        raise SettingsError(
            f"{given} shards the model over all processes by itself; start with torchrun, or with "
            "train/configs/accelerate/expert_parallel.yaml, not with FSDP, DeepSpeed or a parallelism_config."
        )
    if num_processes % tensor_size or num_processes % expert_size:
        raise SettingsError(f"{given} does not divide the number of processes, {num_processes}; start a multiple.")
    if load_best_model_at_end:
        raise SettingsError(
            f"load_best_model_at_end=true does not go with {given}, whose weights are loaded at the start only; set "
            "it to false and take the checkpoint that best_model_checkpoint in trainer_state.json names."
        )
    if expert_size > 1 and expert_size % tensor_size:
        raise SettingsError(f"{given}: the experts' must be a multiple of the other, or 1.")


def batches_at_a_time(num_processes: int, tensor_size: int, context_size: int) -> int:
    """Return how many processes, or groups of them that share a batch, have batches of their own."""
    return num_processes // (tensor_size * context_size)


def accumulation_steps(
    tokens_per_step: int | None, given_steps: int, block_size: int, micro_batch_size: int, num_batches: int
) -> int:
    """Return the micro-batches of a step, so that it takes `tokens_per_step` tokens, or else `given_steps`.

    Args:
        micro_batch_size: blocks of a process's micro-batch.
        num_batches: those at a time, as [`batches_at_a_time`] says.

    Raises:
        SettingsError: if no number of micro-batches makes them, or both are given.
    """
    if tokens_per_step is None:
        return given_steps
    if given_steps != 1:
        raise SettingsError(
            f"tokens_per_step={tokens_per_step} and gradient_accumulation_steps={given_steps} say the same thing; "
            "give one of them."
        )
    micro_batch_tokens = block_size * micro_batch_size * num_batches
    if tokens_per_step < 1 or tokens_per_step % micro_batch_tokens:
        raise SettingsError(
            f"tokens_per_step={tokens_per_step} is not a multiple of {micro_batch_tokens} = block_size x "
            f"per_device_train_batch_size x batches at a time = {block_size} x {micro_batch_size} x {num_batches}."
        )
    return tokens_per_step // micro_batch_tokens
