"""Scores of all models over one table; one model is in memory at a time.

Dimensions: S seeds, P prompts, N responses to each.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ..common.checkpoint_names import NamedCheckpoint
from ..common.devices import free_memory
from ..common.progress import Progress
from ..common.settings import SettingsError
from ..preference.scoring import load_reward_model, score_conversations
from .ensembles import join_scores
from .samples import SampleTable
from .score_table import ScoreTable
from .settings import Ensemble, OveroptimizationSettings, RewardModel


class Scorer:
    """Scores the samples of a table by reward models, each once: what the table has is taken from there.

    Args:
        identities: of all checkpoints that it is asked for, as `checkpoint_identity` returns them.
    """

    def __init__(
        self,
        table: ScoreTable,
        settings: OveroptimizationSettings,
        identities: Mapping[NamedCheckpoint, dict[str, Any]],
        progress: Progress,
    ):
        self._table = table
        self._settings = settings
        self._identities = identities
        self._progress = progress

    def gold(self, checkpoint: NamedCheckpoint | None, column: str | None) -> np.ndarray:
        """Return gold's scores [P, N], by its model or from a column of the samples.

        Raises:
            SettingsError: if there is no such column, gold cannot be loaded, or it gives all responses to a prompt the
                same score, whatever the prompt.
        """
        if checkpoint is not None:
            gold, name = self._scores(checkpoint), checkpoint.path
        else:
            gold, name = gold_column(self._table.samples, column), f"column {column!r}"
        if not np.ptp(gold, axis=1).any():
            raise SettingsError(
                f"{name}: gold scores all responses to a prompt the same; give one that tells them apart."
            )
        return gold

    def models(self, models: Iterable[RewardModel], ensembles: Iterable[Ensemble]) -> dict[str, np.ndarray]:
        """Return the scores [S, P, N] of each reward model and ensemble by its name.

        Raises:
            SettingsError: if a reward model cannot be loaded, or a score is no number.
        """
        scores = {model.name: np.stack([self._scores(one) for one in model.checkpoints]) for model in models}
        joined = {
            one.name: join_scores(np.concatenate([scores[member] for member in one.members]), one.method)
            for one in ensembles
        }
        return scores | {name: table[None] for name, table in joined.items()}

    def source(self, checkpoint: NamedCheckpoint) -> dict[str, Any]:
        """Return which checkpoint it is, and where its scores are; it fits in JSON."""
        facts = self._facts_of(checkpoint)
        return {**asdict(checkpoint), **facts["checkpoint"], "column": self._table.column(facts)}

    def _scores(self, checkpoint: NamedCheckpoint) -> np.ndarray:
        facts = self._facts_of(checkpoint)
        scores = self._table.get(facts)
        if scores is None:
            scores = _checked(self._run(checkpoint), checkpoint.path)
            self._table.add(facts, scores)
        else:
            self._progress.tell(f"{checkpoint.path}: its scores are there already.")
        return scores

    def _run(self, checkpoint: NamedCheckpoint) -> np.ndarray:
        settings, samples = self._settings, self._table.samples
        model, tokenizer = load_reward_model(
            checkpoint.path,
            revision=checkpoint.revision,
            dtype=settings.dtype,
            trust_remote_code=settings.trust_remote_code,
        )
        scores = score_conversations(
            model,
            tokenizer,
            samples.conversations(),
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            progress=self._progress,
        )
        del model
        free_memory()
        return np.array(scores, dtype=float).reshape(samples.shape)

    def _facts_of(self, checkpoint: NamedCheckpoint) -> dict[str, Any]:
        """Return what its scores depend on, which is not its name."""
        return {
            "checkpoint": self._identities[checkpoint],
            "max_length": self._settings.max_length,
            "dtype": self._settings.dtype,
        }


def gold_column(samples: SampleTable, name: str) -> np.ndarray:
    """Return the column [P, N] of `samples` with gold's scores.

    Raises:
        SettingsError: if there is none, or a score is no number.
    """
    if name not in samples.columns:
        there = ", ".join(map(repr, samples.columns)) or "none"
        raise SettingsError(f"gold_column={name!r}: no column with a number for each response; there is {there}.")
    return _checked(samples.columns[name], f"column {name!r}")


def _checked(scores: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(scores).all():
        prompt, response = np.argwhere(~np.isfinite(scores))[0]
        raise SettingsError(
            f"{name}: the score of prompt {prompt}, response {response} is {scores[prompt, response]}; it must be a "
            "number."
        )
    return scores
