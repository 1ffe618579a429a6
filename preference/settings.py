"""Which preference pairs are read, and how coefficients are learned; imports nothing heavy."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from ..common.settings import SettingsError


PREFERENCE_EXTRA = "pip install 'upcycled-moe[preference]'"


def check_trl(what: str) -> None:
    """Check that trl is installed, without importing it; errors say that `what` needs it.

    Raises:
        SettingsError: if it is not.
    """
    if importlib.util.find_spec("trl") is None:
        raise SettingsError(f"{what} needs trl, which is not installed: {PREFERENCE_EXTRA}.")


@dataclass(frozen=True)
class PairSettings:
    """Preference pairs.

    Args:
        data: files (parquet, jsonl, json), folders, globs and Hub datasets.
        split: of folders and Hub datasets.
        max_pairs: the first so many of all; None for all.
        flip_rate: share of pairs, drawn at random, whose answers are exchanged: label noise, for experiments.
        seed: of that draw.

    Raises:
        SettingsError: if there is no data, or a number is outside its range.
    """

    data: Sequence[str]
    split: str = "train"
    max_pairs: int | None = None
    flip_rate: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.data:
            raise SettingsError("No preference pairs are given; name files, folders or Hub datasets.")
        if self.max_pairs is not None and self.max_pairs < 1:
            raise SettingsError(f"max_pairs={self.max_pairs} must be at least 1.")
        if not 0 <= self.flip_rate <= 1:
            raise SettingsError(f"flip_rate={self.flip_rate} is outside [0, 1].")


LOSSES = ("bradley_terry", "lm", "dpo")
# Far above what is of use, and far below what a float32 overflows at.
LARGEST_RATE = 1e6


@dataclass(frozen=True)
class FitSettings:
    """How the coefficients of a merge are learned.

    The defaults move coefficients far within a run: the published ones are learning rates for weights, by which the
    logits of coefficients move less than 1 %. Adam moves a logit by about the learning rate a step.

    Args:
        loss: `bradley_terry`, of a reward model on pairs; `dpo`, of a language model on pairs, against a reference;
            `lm`, of a language model on text.
        learning_rate: of Adam on the logits of the coefficients; it warms up, then falls linearly to zero.
        max_steps: optimizer steps.
        warmup_steps: of them, those in which the learning rate rises; None for a tenth.
        batch_size: pairs, or blocks of text, in a forward pass.
        gradient_accumulation_steps: forward passes in an optimizer step.
        max_length: tokens of a prompt with an answer. Pairs that are longer are left out for `bradley_terry`; for
            `dpo` only those whose prompt is, and answers are cut.
        beta: of DPO.
        holdout: share of the data that is not learned from: the loss on it is measured before and after.
        gradient_checkpointing: compute activations twice and store fewer.
        seed: of the split and the order of the data.

    Raises:
        SettingsError: if a setting is outside its range.
    """

    loss: str = "bradley_terry"
    learning_rate: float = 0.1
    max_steps: int = 100
    warmup_steps: int | None = None
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_length: int = 1024
    beta: float = 0.1
    holdout: float = 0.2
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise SettingsError(f"loss={self.loss!r}: choose one of {', '.join(LOSSES)}.")
        for name in ("learning_rate", "beta"):
            value = getattr(self, name)
            if not 0 < value <= LARGEST_RATE:
                raise SettingsError(f"{name}={value} must be above zero, and at most {LARGEST_RATE:,g}.")
        for name in ("max_steps", "batch_size", "gradient_accumulation_steps", "max_length"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= self.max_steps:
            raise SettingsError(f"warmup_steps={self.warmup_steps} is outside [0, max_steps={self.max_steps}].")
        if not 0 < self.holdout < 1:
            raise SettingsError(f"holdout={self.holdout} is outside (0, 1): some data to learn from, some to measure.")
