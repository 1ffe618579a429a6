"""Which files of a checkpoint's folder go to the Hub: those known to belong to it, and nothing else.

A list of what may go up, not of what may not: a folder of a run also holds optimizers, logs, perhaps a file with
tokens, and what is up cannot be called back. What stays behind is listed, with the reason.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.companions import COMPANION_FILES
from ..common.output_folder import LOCK_FILE, staging_folder
from ..common.provenance import PROVENANCE_FILE
from ..common.settings import SettingsError
from ..common.streaming.stored import read_config, read_tensors
from ..model_cards.analysis import ANALYSIS_FILE
from ..model_cards.card import CARD_FILE
from ..model_cards.evaluation import EVALUATION_FILE
from ..model_cards.validation import card_problems
from .parts import (
    INDEX_FILE,
    REPORT_PAGE,
    WEIGHTS_FILE,
    chat_templates,
    code_files,
    is_weights,
    pictures,
    reports,
    required,
)


# Why what is not on the list stays behind, by the first pattern that fits its name.
_REASONS = (
    (".*", "hidden"),
    ("*.partial", "unfinished"),
    ("_unfinished", "unfinished"),
    ("checkpoint-*", "checkpoint of a run, with its optimizer"),
    ("optimizer*", "state of a run"),
    ("scheduler*", "state of a run"),
    ("scaler*", "state of a run"),
    ("rng_state*", "state of a run"),
    ("trainer_state.json", "state of a run"),
    ("training_args.bin", "state of a run"),
    ("pytorch_model_fsdp*", "state of a run"),
    ("global_step*", "state of a run"),
    ("runs", "log"),
    ("logs", "log"),
    ("*.log", "log"),
    ("routing.jsonl", "log"),
    ("router_probes", "log"),
    ("router_saturation.json", "log"),
    ("*.png", "picture that the card does not show"),
)
# A path from the root, of two names or more, in JSON, YAML or Markdown; not the rest of an address.
_ABSOLUTE_PATH = re.compile(rb"(?<![\w/.:<>~*+-])(?:/|~/|[A-Za-z]:\\+)[\w.@+-]+(?:/|\\+)[\w.@+-]+")


@dataclass(frozen=True)
class UploadFile:
    """A file that goes up.

    Args:
        path: in the folder, with slashes.
        state: what tells whether it is still the same file.
        content: of all files but weights, which are read as they go up.
    """

    path: str
    num_bytes: int
    state: tuple[int, ...] = field(repr=False)
    content: bytes | None = field(repr=False)


@dataclass(frozen=True)
class LeftOut:
    """What stays behind: a file, or a folder (its path ends in a slash) with all that is in it."""

    path: str
    reason: str


@dataclass(frozen=True)
class Upload:
    """What of `folder` goes to the Hub, and what does not; both by path.

    Args:
        state: what tells whether it is still the same folder.
    """

    folder: Path
    files: tuple[UploadFile, ...]
    left_out: tuple[LeftOut, ...]
    state: tuple[int, ...] = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)

    @property
    def with_local_paths(self) -> list[str]:
        """Names of the files that may name folders of this machine; code, tokenizers and weights are not searched."""
        return [
            file.path
            for file in self.files
            if file.path.endswith((".json", ".yaml", ".md", ".html"))
            and file.path not in COMPANION_FILES
            and _ABSOLUTE_PATH.search(file.content or b"")
        ]

    def content(self, path: str) -> bytes:
        """Return what is in the file `path`, which is none of weights."""
        return next(file.content for file in self.files if file.path == path)

    def changed(self) -> Path | None:
        """Return what of the checkpoint is not any more what it was when this was planned, None if all of it is."""
        if _state(self.folder, is_folder=True) != self.state:
            return self.folder
        paths = {self.folder / file.path: file.state for file in self.files}
        return next((path for path, state in paths.items() if _state(path) != state), None)

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "num_bytes": self.num_bytes,
            "files": [{"path": file.path, "num_bytes": file.num_bytes} for file in self.files],
            "left_out": [{"path": entry.path, "reason": entry.reason} for entry in self.left_out],
        }


def plan_upload(folder: str | Path) -> Upload:
    """Return what of the checkpoint in `folder` goes to the Hub, having checked that it is whole; reads no weight.

    Raises:
        SettingsError: if it is not whole, or a file that it needs is a link.
    """
    folder = Path(folder)
    state = _state(folder, is_folder=True)
    weights, card = _check_whole(folder)
    code = code_files(folder)
    optional = {PROVENANCE_FILE, *COMPANION_FILES, *reports(folder), *pictures(card), *chat_templates(folder)}
    needed = required(folder, weights, code)
    files, left_out = [], []
    for path in _walk(folder, needed | optional):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() or not path.is_file() or relative not in needed | optional:
            left_out.append(LeftOut(relative + "/" * (path.is_dir() and not path.is_symlink()), _reason(path)))
        else:
            files.append(_read(path, relative, is_weights=relative in weights and relative != INDEX_FILE))
    if missing := needed - {file.path for file in files}:
        raise SettingsError(
            f"{folder / min(missing)}: is a link, and only plain files go to the Hub; put a copy in its place."
        )
    upload = Upload(folder, tuple(files), tuple(left_out), state)
    if changed := upload.changed():
        raise SettingsError(f"{changed}: changed while it was read; wait for what writes there.")
    return upload


def _read(path: Path, relative: str, is_weights: bool) -> UploadFile:
    """Return the file at `path`, as it is at this moment; nothing is read by way of a link."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
        state = _state(file.fileno())
        return UploadFile(relative, state[2], state, None if is_weights else file.read())


def _state(file: Path | int, is_folder: bool = False) -> tuple[int, ...]:
    """Return what changes when a file is replaced or written; of a folder, when another one takes its place."""
    try:
        # A folder may be given by a link to it.
        found = os.stat(file, follow_symlinks=is_folder) if isinstance(file, Path) else os.fstat(file)
    except OSError:
        return ()
    place = (found.st_dev, found.st_ino)
    return place if is_folder else (*place, found.st_size, found.st_mtime_ns, stat.S_IFMT(found.st_mode))


def _check_whole(folder: Path) -> tuple[set[str], str]:
    """Return the names of the weight files of the checkpoint in `folder`, none cut short, and its card."""
    if not folder.is_dir():
        raise SettingsError(f"{folder}: no such folder; give the folder of a checkpoint.")
    place = folder.resolve()
    if (place / LOCK_FILE).exists() or any(parent.name.endswith(".partial") for parent in (place, place.parent)):
        raise SettingsError(f"{folder}: is what a command has not finished writing; run that command again.")
    read_config(str(folder), folder)
    if place.name and (staging_folder(place) / LOCK_FILE).exists():
        raise SettingsError(
            f"{folder}: a command is replacing it, or was killed as it did ({staging_folder(place)}); wait for it, "
            "or run it again."
        )
    if (folder / "adapter_config.json").exists():
        raise SettingsError(f"{folder}: holds an adapter; merge it into its model and save that.")
    names = {tensor.path.name for tensor in read_tensors(folder).values()}
    return names if names == {WEIGHTS_FILE} else {*names, INDEX_FILE}, _checked_card(folder)


def _checked_card(folder: Path) -> str:
    path = folder / CARD_FILE
    if not path.is_file():
        raise SettingsError(f"{folder}: there is no card ({CARD_FILE}); write one with `upcycled-moe card {folder}`.")
    try:
        card = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 ({error.reason}); correct it.") from None
    if problems := card_problems(card, folder):
        more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SettingsError(
            f"{path}: {problems[0].rstrip('.')}{more}; correct it, or write another with `upcycled-moe card {folder}`."
        )
    return card


def _walk(folder: Path, wanted: set[str]) -> Iterator[Path]:
    """Give what is in `folder`, by path; of folders without anything wanted only themselves."""
    folders_of_wanted = {str(parent) for path in wanted for parent in PurePosixPath(path).parents}

    def walk(place: Path) -> Iterator[Path]:
        for path in sorted(place.iterdir()):
            if path.is_dir() and not path.is_symlink() and path.relative_to(folder).as_posix() in folders_of_wanted:
                yield from walk(path)
            else:
                yield path

    return walk(folder)


def _reason(path: Path) -> str:
    if path.is_symlink():
        return "link"
    if is_weights(path.name):
        return "weights that nothing loads"
    if path.name in (EVALUATION_FILE, ANALYSIS_FILE, REPORT_PAGE):
        return "no report of our commands"
    known = (reason for pattern, reason in _REASONS if fnmatchcase(path.name, pattern))
    return next(known, "not known as part of a checkpoint")
