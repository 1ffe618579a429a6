"""Which checkpoint a run goes on from, and whether it is whole."""

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, strtobool

from ...common.settings import SettingsError
from ..data.blocks import read_position
from ..engines import DEEPSPEED_FILE, OPTIMIZER_FOLDER, shards_at_load
from ..errors import RunEnded
from ..messages import warn
from .staging import clear_leftovers, finish_moving_model


# What shards a run's model, or its optimizer: each has names of its own for what it saves.
Engine = Literal["fsdp", "deepspeed", "sharded_at_load"]
ENGINE_NAMES: dict[Engine | None, str] = {
    None: "whole copies of the model",
    "fsdp": "FSDP",
    "deepspeed": "DeepSpeed",
    "sharded_at_load": "tensor_parallel_size or expert_parallel_size above 1",
}
# The resolved settings of a run, which `--config` takes.
CONFIG_FILE = "training_config.yaml"
# How many of the last steps before a checkpoint were left out, if any.
SKIPPED_FILE = "skipped_steps.json"


def checkpoint_folders(output_dir: str | Path, last_step: int | None = None) -> list[Path]:
    """Return the checkpoints in `output_dir` up to `last_step`, by step, whole or not."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((folder for folder in folders if last_step is None or _step(folder) <= last_step), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoint_before_skipped(output_dir: str | Path, step: int, num_skipped: int) -> Path | None:
    """Return the newest whole checkpoint from before the last `num_skipped` steps up to `step`, or None.

    One from before the last step that moved the weights comes first: that step may have ruined them.
    """
    moved = step - num_skipped
    for last_step in (moved - 1, moved):
        for folder in reversed(checkpoint_folders(output_dir, last_step)):
            if not num_skipped_before(folder) and fault_of(folder, engine_of(folder)) is None:
                return folder
    return None


def num_skipped_before(checkpoint: str | Path) -> int:
    """Return how many of the last steps before `checkpoint` were left out."""
    file = Path(checkpoint, SKIPPED_FILE)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else 0


def checkpoint_to_resume(training_args: TrainingArguments) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` means, or None for a fresh start.

    `last` and `auto` pass over checkpoints whose saving was cut short, and say so. One of the last step is resumed
    from only if the final model is missing, to save it.

    Raises:
        RunEnded: if `auto` finds the final model.
        SettingsError: if there is none, the one that is named is not whole, it is another engine's, nothing is left
            to train, or a fresh start would mix its checkpoints with those of another run.
    """
    wanted, output_dir = training_args.resume_from_checkpoint, training_args.output_dir
    folders = checkpoint_folders(output_dir)
    with training_args.main_process_first(local=training_args.save_on_each_node):
        if training_args.should_save:
            finish_moving_model(Path(output_dir))
            # A finished run may have been killed as it cleared them.
            clear_leftovers(Path(output_dir))
    if wanted == "auto" and (step := _final_step(Path(output_dir))) is not None and step >= training_args.max_steps:
        raise RunEnded(0, f"{output_dir} holds the final model of step {step}; nothing is left to train.")
    if wanted in ("last", "auto"):
        for folder in reversed(folders):
            if (fault := fault_of(folder, engine_of(folder))) is None:
                return _worth_resuming(folder, training_args)
            if training_args.process_index == 0:
                warn(f"{folder} is passed over: {fault}.")
        if wanted == "auto":
            return None
        raise SettingsError(
            f"resume_from_checkpoint=last, but {output_dir} holds no complete checkpoint; "
            "leave it out to start, or set it to auto."
        )
    if wanted is not None:
        folder = Path(wanted)
        if (fault := fault_of(folder, engine_of(folder))) is not None:
            raise SettingsError(f"resume_from_checkpoint={wanted}: not a complete checkpoint: {fault}.")
        resumed = _worth_resuming(folder, training_args)
        if folder.resolve() in [older.resolve() for older in folders[:-1]] and training_args.process_index == 0:
            warn(
                f"{folders[-1]} stays until this run comes to its step, and resume_from_checkpoint=last would go on "
                f"from there; remove what is later than {folder.name}, or choose another output_dir."
            )
        return resumed
    # The Trainer writes its state last: without it a folder is what an interrupted first save left.
    saved = [folder for folder in folders if (folder / TRAINER_STATE_NAME).is_file()]
    if saved:
        raise SettingsError(
            f"{output_dir} holds {saved[-1].name} of an earlier run; continue it with "
            "resume_from_checkpoint=last, or choose another output_dir."
        )
    return None


def _worth_resuming(folder: Path, training_args: TrainingArguments) -> str:
    engine, wrote = running_engine(training_args), engine_of(folder)
    if engine != wrote:
        raise SettingsError(
            f"resume_from_checkpoint={training_args.resume_from_checkpoint}: {folder} was saved with "
            f"{ENGINE_NAMES[wrote]}, this run has {ENGINE_NAMES[engine]}, and an optimizer is only resumed in the "
            "same way; start in that way, or choose another output_dir for a new run."
        )
    step = _saved_step(folder)
    is_final = _final_step(Path(training_args.output_dir)) is not None
    if step > training_args.max_steps or (step == training_args.max_steps and is_final):
        raise SettingsError(
            f"{folder} is at step {step} of max_steps={training_args.max_steps}, so nothing is left to train; raise "
            "max_steps, or take the model from that folder."
        )
    return str(folder)


def _saved_step(folder: Path) -> int:
    _check_trainer_state(folder / TRAINER_STATE_NAME)
    return json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]


def _final_step(output_dir: Path) -> int | None:
    """Return the step of the final model in `output_dir`, or None if it is not there or not whole."""
    try:
        _check_exists(output_dir / CONFIG_NAME)
        _check_weights(output_dir)
        return _saved_step(output_dir)
    except _FaultError:
        return None


def running_engine(training_args: TrainingArguments) -> Engine | None:
    """Return what shards the model of this run; None for whole copies of it."""
    for engine in ("fsdp", "deepspeed"):
        if getattr(training_args, engine) or strtobool(os.environ.get(f"ACCELERATE_USE_{engine.upper()}", "false")):
            return engine
    return "sharded_at_load" if shards_at_load(training_args) else None


def engine_of(folder: Path) -> Engine | None:
    """Return what sharded the run that saved the checkpoint `folder`, by the names of its files."""
    if any(folder.glob("pytorch_model_fsdp*")):
        return "fsdp"
    if (folder / DEEPSPEED_FILE).is_file():
        return "deepspeed"
    return "sharded_at_load" if (folder / OPTIMIZER_FOLDER).is_dir() else None


def fault_of(folder: Path, engine: Engine | None = None) -> str | None:
    """Return what the checkpoint `folder` lacks, or None if a run can go on from it exactly.

    The Trainer goes on from a checkpoint without an optimizer or random states too, with other weights than those of
    a run that was not interrupted, and says nothing.

    Args:
        engine: What shards the model of the run that saved it.
    """
    if not folder.is_dir():
        return "no such folder"
    try:
        _check_trainer_state(folder / TRAINER_STATE_NAME)
        if engine == "fsdp":
            _check_sharded(folder, "pytorch_model_fsdp")
            _check_sharded(folder, "optimizer")
        elif engine == "deepspeed":
            _check_deepspeed(folder)
        else:
            _check_weights(folder)
            # Models that are sharded as they are loaded save whole weights and a sharded optimizer.
            if engine == "sharded_at_load":
                _check_sharded(folder, "optimizer")
            else:
                _check_archive(folder / "optimizer.pt")
        if engine != "deepspeed" or (folder / "scheduler.pt").exists():
            _check_archive(folder / "scheduler.pt")
        for name in _random_state_files(folder):
            _check_archive(folder / name)
    except _FaultError as fault:
        return str(fault)
    return None


class _FaultError(Exception):
    """What is wrong with a checkpoint."""


def _check_trainer_state(file: Path) -> None:
    _check_exists(file)
    try:
        is_state = isinstance(json.loads(file.read_text(encoding="utf-8"))["global_step"], int)
    except (ValueError, KeyError, TypeError):
        is_state = False
    if not is_state:
        raise _FaultError(f"{file.name} is empty or cut short")


def _check_exists(file: Path) -> None:
    if not file.is_file():
        raise _FaultError(f"{file.name} is missing")


def _check_archive(file: Path) -> None:
    """Check a file of `torch.save`, whose table of contents is at its end."""
    _check_exists(file)
    if not zipfile.is_zipfile(file):
        raise _FaultError(f"{file.name} is empty or cut short")


def _check_sharded(folder: Path, name: str) -> None:
    """Check what FSDP saves whole as one file, or sharded as a folder whose `.metadata` is written last."""
    if (folder / f"{name}_0").is_dir():
        if not (folder / f"{name}_0" / ".metadata").is_file():
            raise _FaultError(f"{name}_0 is cut short")
    else:
        _check_archive(folder / f"{name}.bin")


def _check_deepspeed(folder: Path) -> None:
    """Check the folder that a file of DeepSpeed names, which it writes after all others."""
    _check_exists(folder / DEEPSPEED_FILE)
    states = folder / (folder / DEEPSPEED_FILE).read_text(encoding="utf-8").strip()
    files = list(states.glob("*_states.pt"))
    if states == folder or not any(file.name.endswith("_model_states.pt") for file in files):
        raise _FaultError(f"the folder that {DEEPSPEED_FILE} names has no model states")
    for file in files:
        _check_archive(file)


def _check_weights(folder: Path) -> None:
    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _FaultError(f"{index.name} is empty or cut short") from None
    for name in names:
        _check_exists(folder / name)
        try:
            # It compares the length of the file with what the header announces.
            with safe_open(folder / name, framework="pt"):
                pass
        except SafetensorError:
            raise _FaultError(f"{name} is empty or cut short") from None


def _random_state_files(folder: Path) -> list[str]:
    """Return the names of the files with the random states of all processes that saved `folder`."""
    try:
        position = read_position(folder)
    except ValueError as error:
        raise _FaultError(str(error)) from None
    if position is not None:
        num_processes = position["num_processes"]
    else:
        ranks = [int(file.stem.removeprefix("rng_state_")) for file in folder.glob("rng_state_*.pth")]
        num_processes = max(ranks, default=0) + 1
    return ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{rank}.pth" for rank in range(num_processes)]
