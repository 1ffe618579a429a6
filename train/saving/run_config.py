"""The settings that a run had, in a file that repeats it."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..arguments import Arguments, resolved_settings
from ..data.blocks import blocks_per_step
from ..model import CONFIG_FIELDS
from .checkpoints import CONFIG_FILE, ENGINE_NAMES, running_engine


if TYPE_CHECKING:
    from ..trainer import UpcyclingTrainer

PACKAGES = ("upcycled-moe", "transformers", "accelerate", "torch")


def write_config(arguments: Arguments, trainer: "UpcyclingTrainer") -> None:
    """Write the settings of a run, as they are in effect, for `--config`; what no setting says is a comment above."""
    output_dir = Path(arguments.training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    settings = yaml.safe_dump(
        {**resolved_settings(arguments), **_effective_settings(arguments, trainer)},
        sort_keys=False,
        allow_unicode=True,
    )
    header = "".join(f"# {line}\n" for line in _circumstances(arguments, trainer))
    (output_dir / CONFIG_FILE).write_text(header + settings, encoding="utf-8")


def _effective_settings(arguments: Arguments, trainer: "UpcyclingTrainer") -> dict[str, Any]:
    """Return what the run uses where a setting leaves it to the model, or to another setting."""
    args, model = arguments.training, trainer.model
    settings = {"data_seed": args.seed if args.data_seed is None else args.data_seed}
    settings |= {name: getattr(model.config, name) for name in CONFIG_FIELDS if hasattr(model.config, name)}
    if hasattr(model.config, "router_dtype"):
        settings["router_dtype"] = model.config.router_dtype or "model"
    if hasattr(model, "loss_chunk_tokens"):
        settings["loss_chunk_tokens"] = model.loss_chunk_tokens
    return settings


def _circumstances(arguments: Arguments, trainer: "UpcyclingTrainer") -> list[str]:
    args = arguments.training
    num_tokens = blocks_per_step(args) * arguments.data.block_size
    return [
        ", ".join(f"{package} {version(package)}" for package in PACKAGES),
        f"{args.world_size} processes with {ENGINE_NAMES[running_engine(args)]}, mixed precision "
        f"{trainer.accelerator.mixed_precision}",
        f"{num_tokens:,} tokens a step, in {args.gradient_accumulation_steps} micro-batches of each process",
    ]
