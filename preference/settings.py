"""Which preference pairs are read. Imports nothing heavy: the command line shows the choices."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.settings import SettingsError


PREFERENCE_EXTRA = "pip install 'upcycled-moe[preference]'"


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
