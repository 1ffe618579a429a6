"""`upcycled-moe plan --train`: what training a model will cost, from its configuration and the settings of the run."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.settings import SettingsError, parse_size


if TYPE_CHECKING:
    from ..common.flops import Gpu
    from ..train.memory import MemoryEstimate
    from ..train.plan import TrainingPlan

DEFAULT_UTILIZATION = 0.4
PART_NAMES = {
    "weights": "Weights",
    "gradients": "Gradients",
    "optimizer": "Optimizer",
    "weight_copies": "Weights as autocast copies them",
    "activations": "Activations",
    "loss": "Logits and loss",
    "communication": "Gathered layers and buffers",
    "overhead": "Driver and libraries (assumed)",
}


def run_training_plan(options: argparse.Namespace) -> int:
    """Print the plan of training the checkpoint that `options` name, and of its conversion if it is dense."""
    from ..train.arguments import parse_settings
    from ..train.plan import plan_training, read_accelerate_config
    from .console import quiet_libraries
    from .plan import plan_conversion, print_plan

    quiet_libraries()
    if not 0 < (utilization := DEFAULT_UTILIZATION if options.mfu is None else options.mfu) <= 1:
        raise SettingsError(f"--mfu {options.mfu:g} is outside (0, 1].")
    files = [part for setting in options.train if "=" not in setting for part in ("--config", setting)]
    settings = parse_settings([*files, *(setting for setting in options.train if "=" in setting)])
    accelerate = read_accelerate_config(options.accelerate) if options.accelerate is not None else {}
    if options.num_processes is not None:
        if options.num_processes < 1:
            raise SettingsError(f"--num-processes {options.num_processes} must be at least 1.")
        accelerate["num_processes"] = options.num_processes

    conversion, out = None, Path()
    config = _moe_config(options, settings)
    if config is None:
        conversion, out = plan_conversion(options)
        config = conversion.config
    gpu, gpu_memory_bytes = _gpu(options.gpu)
    if options.gpu_memory is not None:
        gpu_memory_bytes = parse_size("--gpu-memory", options.gpu_memory)
    training = plan_training(
        config,
        settings,
        accelerate,
        gpu=gpu,
        gpu_memory_bytes=gpu_memory_bytes,
        utilization=utilization,
    )
    if options.json:
        shown = conversion.to_dict(out) if conversion is not None else {}
        print(json.dumps({**shown, "training": training.to_dict()}, indent=2))
        return 0
    if conversion is not None:
        print_plan(conversion, out, as_json=False)
        print()
    _print_training(training)
    return 0


def _moe_config(options: argparse.Namespace, settings: dict[str, Any]) -> Any:
    """Return the configuration of the checkpoint to train if it has experts already, else None."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    import modeling_upcycled_moe  # noqa: F401 (registers the classes)

    from ..common.flops import num_experts

    named_elsewhere = options.recipe is not None or hasattr(options, "model")
    if not options.places and named_elsewhere:
        return None
    name = options.places[0] if options.places else settings.get("model_name_or_path")
    if name is None:
        raise SettingsError("the checkpoint is missing: give it as DENSE, or as model_name_or_path=... after --train.")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except StrictDataclassError as error:
        raise SettingsError(f"{name}: {error.__cause__ or error}") from error
    except (OSError, ValueError) as error:
        raise SettingsError(f"{name}: {' '.join(str(error).split())}") from error
    if num_experts(config) == 0:
        options.places = options.places or [name]
        return None
    _refuse_conversion(options, name)
    return config


def _refuse_conversion(options: argparse.Namespace, name: str) -> None:
    """Check that nothing is said of converting the checkpoint `name`, which has experts already.

    Raises:
        SettingsError: if something is.
    """
    from ..conversion.recipe import ConversionRecipe

    names = ["recipe"] * (options.recipe is not None)
    names += [setting.name for setting in dataclasses.fields(ConversionRecipe) if hasattr(options, setting.name)]
    flags = ", ".join("--" + given.replace("_", "-") for given in names)
    if flags:
        raise SettingsError(f"{flags}: of a conversion, but {name} has experts already; leave out what converts.")
    if len(options.places) > 1:
        raise SettingsError(f"OUT={options.places[1]}: {name} has experts already and is not converted; leave it out.")


def _gpu(name: str | None) -> "tuple[Gpu | None, int | None]":
    """Return the GPU `name`, or else the one here, and the bytes that the latter has; None for what is not known."""
    from ..common.flops import GPUS, find_gpu

    if name is None:
        import torch

        if not torch.cuda.is_available():
            return None, None
        return find_gpu(torch.cuda.get_device_name()), torch.cuda.get_device_properties(0).total_memory
    gpu = GPUS.get(name.lower()) or find_gpu(name)
    if gpu is None:
        raise SettingsError(f"--gpu {name!r} is not known; known: {', '.join(GPUS)}. Give its --gpu-memory instead.")
    return gpu, None


def _print_training(training: "TrainingPlan") -> None:
    from rich.markup import escape
    from rich.table import Table

    from ..common.numbers import format_bytes, format_count
    from .console import results_table, stdout_console

    console, layout = stdout_console(), training.layout
    summary = Table(show_header=False, box=None, pad_edge=False)
    rows = {
        "Layout": _describe_layout(training),
        "Tokens a step": f"{training.tokens_per_step:,} = {layout.gradient_accumulation_steps} x micro-batches of "
        f"{layout.micro_batch_size} x {layout.sequence_length}",
        "FLOPs per token": f"{format_count(training.flops_per_token)} forward and backward, attention scores included",
    }
    if training.max_steps is None:
        rows["Steps"] = "not given; add max_steps=... for the tokens and FLOPs of the run"
    else:
        rows["Steps"] = f"{training.max_steps:,}, {format_count(training.total_tokens)} tokens"
        rows["FLOPs"] = f"{training.total_flops:.3g}"
    if training.hours is not None:
        rows["Hours"] = (
            f"{training.hours:,.1f}, if {training.utilization:.0%} of the peak of {layout.num_processes} x "
            f"{training.peak_flops_per_device / 1e12:,.4g} TFLOP/s are reached (an assumption: --mfu)"
        )
    for name, value in rows.items():
        summary.add_row(f"[bold]{name}[/]", escape(value))
    console.print(summary)

    parts = results_table("Memory of each GPU", f"At the {training.memory.moment}", "Size", numbers=("Size",))
    for name, num_bytes in training.memory.parts.items():
        if num_bytes:
            parts.add_row(PART_NAMES[name], format_bytes(num_bytes))
    parts.add_row("[bold]Together[/]", f"[bold]{format_bytes(training.memory.total_bytes)}[/]")
    console.print()
    console.print(parts)
    for note in training.memory.notes:
        console.print(note)
    _print_fit(training)


def _print_fit(training: "TrainingPlan") -> None:
    from ..common.numbers import format_bytes
    from .console import results_table, stdout_console

    if training.missing_bytes is None:
        return
    console, memory = stdout_console(), format_bytes(training.gpu_memory_bytes)
    if training.missing_bytes <= 0:
        console.print(f"Fits into {memory}; {format_bytes(-training.missing_bytes)} are left.")
        return
    console.print(f"[bold]Does not fit into {memory}: {format_bytes(training.missing_bytes)} are missing.[/]")
    remedies = training.remedies()
    if not remedies:
        console.print("No setting known here makes it smaller; use more GPUs or a smaller model.")
        return
    table = results_table("What would need less", "Setting", "Size", "Fits", numbers=("Size",))
    for name, estimate in remedies:
        table.add_row(name, format_bytes(estimate.total_bytes), _fits(estimate, training))
    console.print()
    console.print(table)


def _fits(estimate: "MemoryEstimate", training: "TrainingPlan") -> str:
    return "yes" if estimate.total_bytes <= training.gpu_memory_bytes else "no"


def _describe_layout(training: "TrainingPlan") -> str:
    layout = training.layout
    engines = {
        "ddp": "one process" if layout.num_processes == 1 else "whole copies (DDP)",
        "fsdp2": f"shards of {layout.num_shards} (FSDP2)" if layout.num_shards > 1 else "whole copies (FSDP2)",
        "zero3": "DeepSpeed ZeRO-3",
        "load": "sharded at load",
    }
    sizes = {
        "tensor": layout.tensor_parallel_size,
        "expert": layout.expert_parallel_size,
        "context": layout.context_parallel_size,
    }
    parts = [f"{layout.num_processes} GPU{'s' * (layout.num_processes > 1)}", engines[layout.engine]]
    parts += [f"{name} parallel {size}" for name, size in sizes.items() if size > 1]
    weights, computed = (str(dtype).removeprefix("torch.") for dtype in (layout.weight_dtype, layout.mixed_precision))
    parts.append(f"weights in {weights}" + f", computed in {computed}" * (layout.mixed_precision is not None))
    parts.append(layout.optim)
    if layout.gradient_checkpointing:
        parts.append("activation checkpointing")
    return ", ".join(parts)
