"""Whether a run can write where it is told to, before it loads anything."""

import os
from pathlib import Path

from ...common.settings import SettingsError
from ..saving.checkpoints import checkpoint_to_resume
from .reward_training_arguments import RewardTrainingArguments


def check_output_dir(args: RewardTrainingArguments) -> None:
    """Check that `output_dir` can be written, and holds no other run's checkpoints.

    Raises:
        SettingsError: if not.
    """
    folder = Path(args.output_dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise SettingsError(f"output_dir={args.output_dir}: {existing} is a file; give a folder that can be made.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SettingsError(
            f"output_dir={args.output_dir}: no permission to write in {existing}; give another folder."
        )
    if args.resume_from_checkpoint is None:
        checkpoint_to_resume(args)
