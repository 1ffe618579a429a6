"""Checks of a study's settings that need the libraries which read them; before anything runs."""

import dataclasses
from pathlib import Path
from typing import Any

import stages
from study_settings import Method, StudySettings

from upcycled_moe.common.settings import SettingsError, check_keys


def check_models_and_training(study: StudySettings) -> None:
    """Check what the study passes on to `Qwen2Config`, to `train.py` and to conversions.

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
    for parent, settings in study.parents.items():
        config = _parent_config({**study.model, **settings}, study.text.vocab_size, f"parents.{parent}")
        for name, method in study.methods_of(parent).items():
            if method.recipe is not None:
                try:
                    _check_conversion(study, method, config)
                except SettingsError as error:
                    raise SettingsError(f"methods.{name}, parent {parent!r}: {error}") from error


def _parent_config(settings: dict[str, Any], vocab_size: int, where: str) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import Qwen2Config

    try:
        config = Qwen2Config(vocab_size=vocab_size, **settings)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise SettingsError(f"{where}: {str(error.__cause__ or error).splitlines()[-1].strip()}") from error
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for name in (*sizes, "max_position_embeddings"):
        if type(getattr(config, name)) is not int or getattr(config, name) < 1:
            raise SettingsError(f"{where}: {name}={getattr(config, name)!r} must be a whole number, at least 1.")
    if config.hidden_size % config.num_attention_heads:
        raise SettingsError(
            f"{where}: hidden_size={config.hidden_size} must be a multiple of num_attention_heads="
            f"{config.num_attention_heads}."
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise SettingsError(
            f"{where}: num_attention_heads={config.num_attention_heads} must be a multiple of num_key_value_heads="
            f"{config.num_key_value_heads}."
        )
    config.architectures = ["Qwen2ForCausalLM"]
    return config


def _check_conversion(study: StudySettings, method: Method, config: Any) -> None:
    """Check the recipe of `method` against a parent with this `config`, which need not be there yet."""
    from upcycled_moe.conversion.plan import build_config
    from upcycled_moe.conversion.routers import ROUTER_INITIALIZERS
    from upcycled_moe.conversion.source import DenseSource
    from upcycled_moe.conversion.tensors import router_module

    recipe = study.recipe_of(method, calibration_data=[stages.PARENT_FILE])
    source = DenseSource(name="parent", folder=Path("parent"), revision=None, config=config, tensors={})
    moe = build_config(source, recipe, ROUTER_INITIALIZERS[recipe.router](source, recipe).config_fields())
    if recipe.calibration_data and recipe.calibration_block_size > config.max_position_embeddings:
        raise SettingsError(
            f"calibration_block_size={recipe.calibration_block_size} exceeds max_position_embeddings="
            f"{config.max_position_embeddings}; lower it."
        )
    if method.fold_routers and recipe.router == "linear":
        raise SettingsError("fold_routers: its routers are linear already; leave it out.")
    if method.fold_routers and (obstacle := router_module(moe).fold_obstacle):
        raise SettingsError(f"fold_routers: {obstacle}")
