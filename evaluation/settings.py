"""What an evaluation can be asked for. Imports nothing heavy: the command line shows the defaults."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.settings import SettingsError
from ..common.text_settings import DTYPES


AUTO = "auto"


@dataclass(frozen=True)
class EvaluationSettings:
    """The tasks and the text of an evaluation, and how it runs.

    Args:
        tasks: names of tasks, groups and tags of lm-evaluation-harness, or `router_upcycling`; none for perplexity
            alone.
        offline_data: folder with the data of the paper's tasks; by default it comes from the Hub.
        limit: the first so many items of each task; by default all.
        perplexity_data: files, folders, globs and Hub datasets to measure perplexity on; see `open_text`.
        split: of folders and Hub datasets among them.
        text_column: column that holds the text.
        domain_column: column that holds the domain; by default `domain` where there is one, else sub-folder or file
            say it.
        tokens_per_domain: the first so many tokens of each domain are read, or all if it has fewer.
        block_size: tokens in a block; by default 1024, or the fewest positions of a model.
        batch_size: prompts or blocks in a forward pass; `auto` lets the harness try what fits into memory.
        dtype: to compute in; `auto` is that of the checkpoint.
        trust_remote_code: whether the code of a Hub checkpoint may run.

    Raises:
        SettingsError: if nothing is asked for, or a number is below 1.
    """

    tasks: Sequence[str] = ()
    offline_data: Path | None = None
    limit: int | None = None
    perplexity_data: Sequence[str] = ()
    split: str = "validation"
    text_column: str = "text"
    domain_column: str | None = None
    tokens_per_domain: int = 65536
    block_size: int | None = None
    batch_size: int | str = 8
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.tasks and not self.perplexity_data:
            raise SettingsError("nothing to evaluate; give tasks, or perplexity_data.")
        for name, user in (("offline_data", "tasks"), ("limit", "tasks"), ("block_size", "perplexity_data")):
            if getattr(self, name) is not None and not getattr(self, user):
                raise SettingsError(f"{name} is for {user}, and none are given.")
        for name in ("limit", "tokens_per_domain", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise SettingsError(f"{name}={value} must be at least 1.")
        if self.block_size is not None and self.block_size < 2:
            raise SettingsError(f"block_size={self.block_size} must be at least 2, a token and one to predict.")
        if isinstance(self.batch_size, str) and self.batch_size != AUTO:
            raise SettingsError(f"batch_size={self.batch_size!r} must be a number or {AUTO}.")
        if self.dtype not in DTYPES:
            raise SettingsError(f"dtype={self.dtype!r}: choose one of {', '.join(DTYPES)}.")

    @property
    def blocks_per_batch(self) -> int:
        """Blocks of text in a forward pass; all have the same length, so that the harness's search is not needed."""
        return EvaluationSettings.batch_size if self.batch_size == AUTO else int(self.batch_size)
