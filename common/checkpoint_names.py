"""Checkpoints, several of them, as a command line names them: `PATH` or `org/name@revision`, or `NAME=` before it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .settings import SettingsError


@dataclass(frozen=True)
class NamedCheckpoint:
    """A checkpoint, and what a table of several calls it.

    Args:
        path: folder or Hub id.
        revision: branch, tag or commit on the Hub.
    """

    name: str
    path: str
    revision: str | None = None


def name_checkpoints(arguments: Sequence[str]) -> list[NamedCheckpoint]:
    """Return the checkpoints that `arguments` name, each with a name of its own.

    A checkpoint without `NAME=` is called by the last part of its path, or by as many as tell it from the others.

    Raises:
        SettingsError: if two have the same name all the same.
    """
    checkpoints = [_parse(argument) for argument in arguments]
    parts = [_parts(checkpoint) for checkpoint in checkpoints]
    named = []
    for number, checkpoint in enumerate(checkpoints):
        others = [other for at, other in enumerate(parts) if at != number and not checkpoints[at].name]
        named.append(replace(checkpoint, name=checkpoint.name or _shortest(parts[number], others)))
    names = [checkpoint.name for checkpoint in named]
    for checkpoint in named:
        if names.count(checkpoint.name) > 1:
            raise SettingsError(
                f"{checkpoint.path}: two checkpoints would be called {checkpoint.name!r}; name them apart, as in "
                f"first={checkpoint.path}."
            )
    return named


def _parse(argument: str) -> NamedCheckpoint:
    """Return the checkpoint, without a name if `argument` gives none."""
    name, path = "", argument
    # A folder may have any character in its name.
    if not Path(argument).is_dir() and "=" in argument:
        name, _, path = argument.partition("=")
    if not path.strip() or ("=" in argument and path != argument and not name.strip()):
        raise SettingsError(f"{argument!r}: give a checkpoint as PATH or NAME=PATH.")
    revision = None
    if not Path(path).is_dir() and "@" in path:
        path, _, revision = path.partition("@")
    return NamedCheckpoint(name.strip(), path, revision or None)


def _parts(checkpoint: NamedCheckpoint) -> tuple[str, ...]:
    path = checkpoint.path
    # A link keeps the name that its owner gave it.
    parts = Path(os.path.abspath(path)).parts if Path(path).is_dir() else tuple(path.split("/"))
    return parts if checkpoint.revision is None else (*parts[:-1], f"{parts[-1]}@{checkpoint.revision}")


def _shortest(parts: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> str:
    """Return as many of the last `parts` as none of `others` ends with, all if one does."""
    for length in range(1, len(parts) + 1):
        if all(other[-length:] != parts[-length:] for other in others):
            return "/".join(parts[-length:])
    return "/".join(parts)
