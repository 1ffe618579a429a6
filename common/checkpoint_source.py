"""A checkpoint that is read: its configuration, and where each of its tensors lies."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from .companions import has_tokenizer
from .provenance import recorded_name
from .streaming.stored import StoredTensor


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint on disk.

    Args:
        name: what the user called it: a folder or a Hub id.
        folder: where its files lie.
        revision: commit of the Hub repository, if it came from there.
        config: its configuration.
        tensors: every tensor by name, in the order of the files.
        provenance: what `upcycling.json` beside the weights says, None if it is not there.
    """

    name: str
    folder: Path
    revision: str | None
    config: PreTrainedConfig
    tensors: dict[str, StoredTensor] = field(repr=False)
    provenance: dict[str, Any] | None = field(repr=False)

    @cached_property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside the weights."""
        return has_tokenizer(self.folder)

    @property
    def record(self) -> dict[str, str | None]:
        """Name and revision as provenance keeps them; `.` and `..` would name another folder there."""
        return {"name": recorded_name(self.name, self.folder), "revision": self.revision}

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, in order."""
        return sorted({tensor.path for tensor in self.tensors.values()})
