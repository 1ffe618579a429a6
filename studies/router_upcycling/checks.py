"""Checks of a study's settings that need the libraries which read them; before anything runs."""

import dataclasses
from pathlib import Path

import stages
from study_settings import StudySettings

from upcycled_moe.common.settings import SettingsError, check_keys


def check_models_and_training(study: StudySettings) -> None:
    """Check what the study passes on to `Qwen2Config` and to `train.py`.

    Raises:
        SettingsError: at the first setting that is unknown or impossible.
    """
    from transformers import Qwen2Config

    from upcycled_moe.train.arguments import DataArguments, ModelArguments, build_arguments
    from upcycled_moe.train.training_arguments import UpcyclingTrainingArguments

    known = {setting.name for setting in dataclasses.fields(Qwen2Config)}
    check_keys(study.model, known, "model")
    for parent, settings in study.parents.items():
        check_keys(settings, known, f"parents.{parent}")
    trainings = {"parent_training": study.parent_training, "training": study.training}
    trainings |= {
        f"methods.{name}.training": {**study.training, **method.training} for name, method in study.methods.items()
    }
    groups = (ModelArguments, DataArguments, UpcyclingTrainingArguments)
    known = {setting.name for group in groups for setting in dataclasses.fields(group) if setting.init}
    for where, training in trainings.items():
        check_keys(training, known, where)
        run = stages.training_settings(training, *map(Path, ("start", "text", "validation")), seed=0, out=Path("out"))
        try:
            build_arguments(run)
        except SettingsError as error:
            raise SettingsError(f"{where}: {error}") from error
