"""What is measured, of which models, on which samples. Imports nothing heavy: the command line shows the choices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.checkpoint_names import NamedCheckpoint, name_checkpoints
from ..common.settings import SettingsError
from ..common.text_settings import DTYPES


ENSEMBLE_METHODS = ("mean", "min")


@dataclass(frozen=True)
class RewardModel:
    """A reward model to optimise; several checkpoints are seeds of one."""

    name: str
    checkpoints: tuple[NamedCheckpoint, ...]


@dataclass(frozen=True)
class Ensemble:
    """A reward model made of others.

    Args:
        method: `mean` or `min` of the standardised scores.
        members: names of reward models; all seeds of each take part.
    """

    name: str
    method: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class PolicySettings:
    """A language model, and how it answers prompts.

    Args:
        policy: the checkpoint.
        prompts: preference pairs, or files with a column `prompt`.
        split: of folders and Hub datasets.
        max_prompts: the first so many different ones; None for all.
        num_samples: responses to each prompt.
        temperature: of the softmax that tokens are drawn from, all of it: no top-k, no top-p.
        max_new_tokens: where a response is cut.
        seed: of the draws.

    Raises:
        SettingsError: if a number is outside its range.
    """

    policy: NamedCheckpoint
    prompts: Sequence[str]
    split: str = "test"
    max_prompts: int | None = None
    num_samples: int = 64
    temperature: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise SettingsError("A policy needs prompts; name preference pairs, or files with a column 'prompt'.")
        for name, least in (("max_prompts", 2), ("num_samples", 2), ("max_new_tokens", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"{name}={value} must be at least {least}.")
        if not self.temperature > 0:
            raise SettingsError(f"temperature={self.temperature} must be above zero, or all responses are the same.")
        if math.isinf(self.temperature):
            raise SettingsError(f"temperature={self.temperature} must be finite, or the policy does not matter.")


@dataclass(frozen=True)
class OveroptimizationSettings:
    """Reward models that are optimised, and gold, which is not.

    Args:
        samples: a file of prompts with their responses, or the policy that answers them.
        gold: the reward model that stands for what people want; None with `gold_column`.
        gold_column: of the samples, with gold's score of each response.
        baseline: name of the reward model or ensemble that others are compared with; by default the first.
        max_length: of a conversation in tokens, which is cut at its beginning; by default a model's positions.
        dtype: to score in; `auto` is that of the checkpoint.
        num_resamples: of the prompts, for the intervals.
        seed: of those.

    Raises:
        SettingsError: if models, gold or a number do not fit together.
    """

    samples: Path | PolicySettings
    reward_models: Sequence[RewardModel]
    gold: NamedCheckpoint | None = None
    gold_column: str | None = None
    ensembles: Sequence[Ensemble] = ()
    baseline: str | None = None
    batch_size: int = 16
    max_length: int | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    num_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.reward_models:
            raise SettingsError("No reward models are given; name one or more, as in dense=./rm.")
        if (self.gold is None) == (self.gold_column is None):
            raise SettingsError("Give gold once: a reward model, or a column of the samples with its scores.")
        if self.gold_column is not None and isinstance(self.samples, PolicySettings):
            raise SettingsError("Samples of a policy have no column of gold scores; give a gold reward model.")
        for name, least in (("batch_size", 1), ("max_length", 1), ("num_resamples", 100), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"{name}={value} must be at least {least}.")
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}.")
        self._check_names()

    def _check_names(self) -> None:
        for name in self.names:
            if self.names.count(name) > 1:
                raise SettingsError(f"Two models are called {name!r}; name them apart.")
        models = {model.name: model for model in self.reward_models}
        for ensemble in self.ensembles:
            unknown = [member for member in ensemble.members if member not in models]
            if unknown:
                raise SettingsError(
                    f"Ensemble {ensemble.name}: {unknown[0]!r} is no reward model; there are {', '.join(models)}."
                )
            if sum(len(models[member].checkpoints) for member in ensemble.members) < 2:
                raise SettingsError(
                    f"Ensemble {ensemble.name}: has one member only; name several models, or one of several seeds."
                )
        if self.baseline is not None and self.baseline not in self.names:
            raise SettingsError(f"baseline={self.baseline!r} is no model; there are {', '.join(self.names)}.")

    @property
    def names(self) -> list[str]:
        """The names of all that is optimised: reward models, then ensembles."""
        return [one.name for one in (*self.reward_models, *self.ensembles)]

    @property
    def baseline_name(self) -> str:
        """The name of what others are compared with."""
        return self.baseline or self.names[0]


def parse_reward_models(arguments: Sequence[str]) -> list[RewardModel]:
    """Return the reward models that `NAME=CKPT[,CKPT …]` arguments name; a NAME that comes again brings more seeds.

    A checkpoint without a name is called by its path, as `name_checkpoints` does.

    Raises:
        SettingsError: if two have the same name by chance, or a checkpoint comes twice under one name.
    """
    seeds: dict[str, list[str]] = {}
    for number, argument in enumerate(arguments):
        name, equals, places = argument.partition("=")
        if Path(argument).exists() or not equals:
            seeds[f"={number}"] = [argument]  # no name begins so
        else:
            listed = [places] if Path(places).exists() else places.split(",")
            seeds.setdefault(name.strip(), []).extend(f"{name}={place.strip()}" for place in listed)
    models = []
    for first, arguments_of_one in zip(
        name_checkpoints([listed[0] for listed in seeds.values()]), seeds.values(), strict=True
    ):
        checkpoints = (first, *(name_checkpoints([argument])[0] for argument in arguments_of_one[1:]))
        for checkpoint in checkpoints:
            if checkpoints.count(checkpoint) > 1:
                raise SettingsError(f"{first.name}: {checkpoint.path} is given twice; give each seed once.")
        models.append(RewardModel(first.name, checkpoints))
    return models


def parse_ensemble(argument: str) -> Ensemble:
    """Return the ensemble that a `NAME=METHOD:MODEL[,MODEL …]` argument describes.

    Raises:
        SettingsError: if it is written otherwise.
    """
    name, equals, description = argument.partition("=")
    method, colon, listed = description.partition(":")
    members = tuple(dict.fromkeys(member.strip() for member in listed.split(",") if member.strip()))
    if not (name.strip() and equals and colon and members):
        raise SettingsError(f"{argument!r}: give an ensemble as NAME=METHOD:MODEL,MODEL, as in worst=min:one,two.")
    if method.strip() not in ENSEMBLE_METHODS:
        raise SettingsError(f"{argument!r}: unknown method {method!r}; choose one of {', '.join(ENSEMBLE_METHODS)}.")
    return Ensemble(name.strip(), method.strip(), members)
