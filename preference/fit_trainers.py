"""The trainers of Transformers and trl that run a model while coefficients of its weights are learned."""

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

from ..common.blocks import collate_blocks
from ..common.settings import SettingsError
from .settings import PREFERENCE_EXTRA, FitSettings


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    training: Dataset,
    heldout: Dataset,
    settings: FitSettings,
    optimizer: torch.optim.Optimizer,
    reference: PreTrainedModel | None,
    folder: Path,
) -> Trainer:
    """Return the trainer of `settings.loss`, which runs `model` where it is and in its type.

    Args:
        reference: of DPO; None for `model` as it is now.
        folder: for what the trainer may write.

    Raises:
        SettingsError: if trl is missing.
    """
    common = {
        "model": model,
        "train_dataset": training,
        "eval_dataset": heldout,
        "optimizers": (optimizer, None),
    }
    arguments = _arguments(model, settings, folder)
    if settings.loss == "lm":
        config = _on_one_device(TrainingArguments(**arguments))
        trainer = Trainer(args=config, data_collator=collate_blocks, **common)
    else:
        trainer = _pair_trainer(tokenizer, settings, reference, arguments, common)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(model: PreTrainedModel, settings: FitSettings, folder: Path) -> dict[str, Any]:
    warmup_steps = settings.max_steps // 10 if settings.warmup_steps is None else settings.warmup_steps
    return {
        "output_dir": str(folder),
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": warmup_steps,
        # It would clip the gradients of the weights, and with them those of the coefficients.
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": settings.batch_size,
        "per_device_eval_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "seed": settings.seed,
        "bf16": False,
        "use_cpu": model.device.type == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": model.device.type != "cpu",
    }


def _pair_trainer(
    tokenizer: PreTrainedTokenizerBase,
    settings: FitSettings,
    reference: PreTrainedModel | None,
    arguments: dict[str, Any],
    common: dict[str, Any],
) -> Trainer:
    try:
        from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
    except ImportError as error:
        raise SettingsError(f"loss={settings.loss!r} needs trl ({error}); {PREFERENCE_EXTRA}.") from None
    common = {**common, "processing_class": tokenizer}
    arguments = {**arguments, "max_length": settings.max_length}
    if settings.loss == "bradley_terry":
        return RewardTrainer(args=_on_one_device(RewardConfig(**arguments)), **common)
    # The log-probabilities of the reference are computed once, so that there is no second model in the steps. Without
    # a reference they are those of the model as it is; trl reads nothing anew then.
    config = DPOConfig(**arguments, beta=settings.beta, precompute_ref_log_probs=True, router_aux_loss_coef=0.0)
    return DPOTrainer(args=_on_one_device(config), ref_model=reference, **common)


def _on_one_device(arguments: TrainingArguments) -> TrainingArguments:
    """Keep a process that sees several GPUs to one: else the model is wrapped for all, which trl refuses."""
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


@contextmanager
def silent() -> Iterator[None]:
    """Keep bars and advice of the libraries off the terminal for a while."""
    verbosity, has_bars = logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    disabled = os.environ.get("TQDM_DISABLE")
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"  # what trl asks
    try:
        with warnings.catch_warnings():
            # Of settings that have another name in later versions, and none in earlier ones.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            datasets.enable_progress_bars()
        if disabled is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = disabled


@contextmanager
def same_afterwards(*models: PreTrainedModel | None) -> Iterator[None]:
    """Give back the models as they were but for their weights, and random numbers as if none had been drawn.

    Trainers seed all generators, and trl gives a model another `forward`, which a copy of the model would share.
    """
    kept = [(model, model.training, model.__dict__.get("forward")) for model in models if model is not None]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for model, training, forward in kept:
            model.train(training)
            model.__dict__.pop("forward", None)
            if forward is not None:
                model.forward = forward
