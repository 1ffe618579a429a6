"""What an analysis can be asked for. Imports nothing heavy: the command line shows the defaults."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.settings import SettingsError


DTYPES = ("auto", "float32", "bfloat16", "float16")
# Of the default block; a model with fewer positions gets its own.
MAX_BLOCK_SIZE = 1024


@dataclass(frozen=True)
class AnalysisSettings:
    """The text of an analysis, and how it runs.

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
        parent: dense checkpoint to compare the experts with; by default the one that `upcycling.json` names, if it is
            a folder here.
        trust_remote_code: whether the code of a Hub checkpoint may run.

    Raises:
        SettingsError: if a number is below 1 or there is no text.
    """

    data: Sequence[str]
    split: str = "validation"
    text_column: str = "text"
    domain_column: str | None = None
    tokens_per_domain: int = 65536
    block_size: int | None = None
    batch_size: int = 4
    dtype: str = "auto"
    parent: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens_per_domain", "block_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"{name}={value} must be at least 1.")
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}.")
