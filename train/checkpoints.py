"""Which checkpoint a run goes on from."""

import re
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..common.settings import SettingsError


def complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints in `output_dir`, oldest first, without those whose saving was cut short."""
    # The Trainer writes its state last.
    folders = [file.parent for file in Path(output_dir).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    folders = [folder for folder in folders if re.fullmatch(r"checkpoint-\d+", folder.name)]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def checkpoint_to_resume(training_args: TrainingArguments) -> str | None:
    """Return the checkpoint that `resume_from_checkpoint` means, or None for a fresh start.

    Raises:
        SettingsError: if there is none, or a fresh start would mix its checkpoints with those of another run.
    """
    wanted, output_dir = training_args.resume_from_checkpoint, training_args.output_dir
    checkpoints = complete_checkpoints(output_dir)
    if wanted in ("last", "auto"):
        if checkpoints:
            return str(checkpoints[-1])
        if wanted == "auto":
            return None
        raise SettingsError(
            f"resume_from_checkpoint=last, but {output_dir} holds no complete checkpoint; "
            "leave it out to start, or set it to auto."
        )
    if wanted is not None:
        if not Path(wanted, TRAINER_STATE_NAME).is_file():
            raise SettingsError(f"resume_from_checkpoint={wanted}: no complete checkpoint there.")
        return wanted
    if checkpoints:
        raise SettingsError(
            f"{output_dir} holds {checkpoints[-1].name} of an earlier run; continue it with "
            "resume_from_checkpoint=last, or choose another output_dir."
        )
    return None
