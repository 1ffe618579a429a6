"""The text that a checkpoint is looked at with, and how the model runs over it. Imports nothing heavy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .settings import SettingsError


DTYPES = ("auto", "float32", "bfloat16", "float16")
# Text that a model is changed by, so that its validation split can judge what came out.
CALIBRATION_SPLIT = "train"
# Of the default block; a model with fewer positions gets its own.
MAX_BLOCK_SIZE = 1024


@dataclass(frozen=True)
class TextSettings:
    """Labelled text, and a pass over it.

    Args:
        data: files, folders, globs and Hub datasets; see `open_text`.
        split: of folders and Hub datasets.
        text_column: column that holds the text.
        domain_column: column that holds the domain; by default `domain` where there is one, else sub-folder or file
            say it.
        tokens_per_domain: the first so many tokens of each domain are read, or all if it has fewer.
        block_size: tokens in a block; by default 1024, or the fewest positions of a model.
        batch_size: blocks in a forward pass; it changes no figure.
        dtype: to compute in; `auto` is that of the checkpoint.

    Raises:
        SettingsError: if a number is below 1.
    """

    data: Sequence[str]
    split: str = "validation"
    text_column: str = "text"
    domain_column: str | None = None
    tokens_per_domain: int = 65536
    block_size: int | None = None
    batch_size: int = 4
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("tokens_per_domain", "block_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name}={value} must be at least 1.")
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}.")

    def block_size_for(self, positions: Mapping[str, int | None]) -> int:
        """Return a block size that fits all models, the same so that they see the same blocks.

        Args:
            positions: how many each model has, by its name; None where there is no limit.

        Raises:
            SettingsError: if the one that is asked for exceeds the positions of a model.
        """
        limits = {name: limit for name, limit in positions.items() if limit is not None}
        if self.block_size is None:
            return min([MAX_BLOCK_SIZE, *limits.values()])
        shortest = min(limits, key=limits.get, default=None)
        if shortest is not None and self.block_size > limits[shortest]:
            raise SettingsError(
                f"block_size={self.block_size} exceeds the {limits[shortest]} positions of {shortest}; lower it."
            )
        return self.block_size
