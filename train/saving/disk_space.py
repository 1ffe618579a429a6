"""Whether a run's checkpoints fit on the disk."""

import math
import shutil
from pathlib import Path

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ...common.numbers import format_bytes
from ..memory import ADAM_STATES, STATE_BYTES, STATES
from .checkpoints import checkpoint_folders


def space_warning(args: TrainingArguments, model: nn.Module, resumed: str | None) -> str | None:
    """Return what to tell a user whose disk will be full before the run ends, or None.

    Args:
        resumed: The checkpoint that the run goes on from.
    """
    weights = sum(tensor.numel() * tensor.itemsize for tensor in model.state_dict().values())
    existing = checkpoint_folders(args.output_dir)
    first_step = 0 if resumed is None else int(Path(resumed).name.rpartition("-")[2])
    num_checkpoints = _num_new_checkpoints(args, first_step, len(existing))
    checkpoint = _folder_bytes(Path(resumed)) if resumed else weights + _optimizer_bytes(args, model)
    needed = num_checkpoints * checkpoint + weights
    free = shutil.disk_usage(args.output_dir).free
    if needed <= free:
        return None
    return (
        f"{args.output_dir} has {format_bytes(free)} free, and this run will need about {format_bytes(needed)}: "
        f"{num_checkpoints} x {format_bytes(checkpoint)} for checkpoints, {format_bytes(weights)} for the final "
        f"model; free some space, or set a lower save_total_limit (now {args.save_total_limit})."
    )


def _num_new_checkpoints(args: TrainingArguments, first_step: int, num_existing: int) -> int:
    """Return how many more checkpoints there will be than now, when there are most."""
    if args.save_strategy == SaveStrategy.NO:
        return 0
    num_saves = 1
    if args.save_strategy == SaveStrategy.STEPS:
        # Below 1 a share of all steps.
        save_steps = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * args.max_steps)
        num_saves = math.ceil((args.max_steps - first_step) / save_steps)
    if not args.save_total_limit:
        return num_saves
    # The oldest is removed once the newest stands.
    return min(num_saves, max(args.save_total_limit + 1 - num_existing, 1))


def _optimizer_bytes(args: TrainingArguments, model: nn.Module) -> int:
    """Return the size of what the optimizer keeps: AdamW's two moments, unless it is known to be another."""
    if args.save_only_model:
        return 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_states = STATES.get(args.optim, ADAM_STATES)
    return round(
        sum(parameter.numel() * STATE_BYTES.get(args.optim, num_states * parameter.itemsize) for parameter in trained)
    )


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
