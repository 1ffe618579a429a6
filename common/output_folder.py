"""A folder that a command writes: it is there whole or not at all, and replaces nothing without leave."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from .numbers import format_bytes
from .provenance import PROVENANCE_FILE
from .settings import SettingsError


# Says that the folder it lies in is ours to delete; locked while a command writes there.
LOCK_FILE = "upcycled-moe.lock"


@dataclass(frozen=True)
class FolderKind:
    """What a folder holds, and by what that is seen: only such a one may be replaced.

    Args:
        files: of which it has one at least.
        keys: of the JSON object in that file; a file of this name that others wrote lacks them.
        contents: names of all that is ever written there; a folder with anything more is not replaced. Empty if they
            cannot be told.
    """

    name: str
    files: tuple[str, ...]
    keys: frozenset[str] = frozenset()
    contents: frozenset[str] = frozenset()

    def is_in(self, folder: Path) -> bool:
        """Return whether `folder` is one of these, whatever else it holds."""
        return any((folder / name).is_file() and self.keys <= _json_keys(folder / name) for name in self.files)

    def strangers(self, folder: Path) -> list[str]:
        """Return the names of what is in `folder` and was never written there."""
        return sorted(path.name for path in folder.iterdir() if self.contents and path.name not in self.contents)


CHECKPOINT = FolderKind("checkpoint", ("config.json", PROVENANCE_FILE))


class OutputError(SettingsError):
    """The output folder cannot be written as asked."""


def check_output_folder(
    out: Path, num_bytes: int, kept: Iterable[Path], overwrite: bool, kind: FolderKind = CHECKPOINT
) -> None:
    """Check, before anything is written, that `out` is free to use and its disk has `num_bytes` for it.

    Args:
        kept: what must not lie in it, as replacing it would delete that.
        overwrite: whether a folder of its `kind` may be replaced.

    Raises:
        OutputError: if not.
    """
    target = out.resolve()
    if target.is_file():
        raise OutputError(f"{out}: is a file; give a folder that does not exist yet.")
    check_kept(out, kept)
    _check_replaceable(out, overwrite, kind)
    # The output comes to be beside its final place, so its parent must be writable, or whatever there is of it.
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{out}: {parent} is a file; give a folder that can be made.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{out}: no permission to write in {parent}.")
    free = shutil.disk_usage(parent).free + _leftover_bytes(out, staging_folder(target))
    if free < num_bytes:
        raise OutputError(
            f"{out}: needs {format_bytes(num_bytes)}, {format_bytes(free)} are free on its disk; make room or write "
            "elsewhere."
        )


def check_kept(out: Path, paths: Iterable[Path]) -> None:
    """Check that none of `paths` lies in the folder `out`, where replacing it would delete them.

    Raises:
        OutputError: if one does.
    """
    target = out.resolve()
    for path in paths:
        if path.expanduser().resolve().is_relative_to(target):
            raise OutputError(
                f"{out}: holds {path.expanduser().resolve()}, which replacing it would delete; give another folder."
            )


def staging_folder(out: Path) -> Path:
    """Return the folder in which `out` comes to be, one level down, so that nothing ever loads from it."""
    return out.with_name(out.name + ".partial")


@contextmanager
def staged(out: Path, overwrite: bool = True, kind: FolderKind = CHECKPOINT) -> Iterator[Path]:
    """Give a fresh folder to write into, and put it in the place of `out` only if all went well.

    On an error the folder is removed. A killed run leaves `OUT.partial`, which does not load; the next run starts it
    anew. What was in `out` is there until the last moment, then for an instant in `OUT.partial`.

    Raises:
        OutputError: if another run is writing to `out`, or what is there may not be replaced.
    """
    shown, out = out, out.resolve()
    partial = staging_folder(out)
    with _locked(shown, partial):
        _bring_back(out)
        _check_replaceable(shown, overwrite, kind)
        _clear(partial)
        folder = partial / out.name
        folder.mkdir()
        yield folder
        _sync(folder)
        # Once more: the folder may have changed since.
        _check_replaceable(shown, overwrite, kind)
        _put_in_place(folder, out)
    _sync_path(out.parent)


@contextmanager
def _locked(out: Path, partial: Path) -> Iterator[None]:
    """Hold the folder `partial` for this run alone, and remove it afterwards.

    The kernel gives the lock back when its holder ends, however it ends; what a killed run leaves blocks nobody.
    """
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        _check_ours(out, partial)
        try:
            descriptor = os.open(partial / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # its last holder has just removed the folder
        try:
            _lock(out, partial, descriptor, fcntl.LOCK_EX)
            if not _is_still(descriptor, partial / LOCK_FILE):
                continue  # locked, but by now another file, or none, has the name
            try:
                yield
            finally:
                _bring_back(out.resolve())
                # Still locked, and the lock last: who comes meanwhile finds a folder that is held, or an empty one.
                _clear(partial, ignore_errors=True)
                with suppress(OSError):
                    (partial / LOCK_FILE).unlink()
                    partial.rmdir()
            return
        finally:
            os.close(descriptor)


def _lock(out: Path, partial: Path, descriptor: int, operation: int) -> None:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{out}: another command is writing it (in {partial}); wait for it, or give another folder."
        ) from None
    except OSError as error:
        error.filename = str(partial / LOCK_FILE)
        raise


def _is_still(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _check_ours(out: Path, partial: Path) -> None:
    if not partial.is_dir():
        raise OutputError(f"{out}: is written by way of {partial}, which is a file; move it away.")
    # An empty one is what a run leaves that is killed between making the folder and the file, or removing them.
    if any(partial.iterdir()) and not (partial / LOCK_FILE).is_file():
        raise OutputError(f"{out}: is written by way of {partial}, which holds other files; move them away.")


def _check_replaceable(out: Path, overwrite: bool, kind: FolderKind) -> None:
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{out}: exists and is not empty; give another folder, or --overwrite to replace it.")
    if not kind.is_in(out):
        raise OutputError(
            f"{out}: is not empty and holds no {kind.name} ({' or '.join(kind.files)}), so --overwrite does not "
            "replace it; empty it yourself, or give another folder."
        )
    if strangers := kind.strangers(out):
        raise OutputError(
            f"{out}: holds {strangers[0]}, which is no part of the {kind.name} there, so --overwrite does not replace "
            "it; move it away, or give another folder."
        )


def _json_keys(path: Path) -> frozenset[str]:
    """Return the keys of the JSON object in `path`; none if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return frozenset()
    return frozenset(content) if isinstance(content, dict) else frozenset()


def _clear(partial: Path, ignore_errors: bool = False) -> None:
    """Delete what is in our folder `partial` but its lock."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=ignore_errors)
        elif path.name != LOCK_FILE:
            path.unlink()


def _replaced_folder(out: Path) -> Path:
    """Return where the old `out` is between being moved away and being deleted."""
    return staging_folder(out) / f"{out.name}.replaced"


def _put_in_place(folder: Path, out: Path) -> None:
    if not out.exists():
        os.replace(folder, out)
        return
    os.replace(out, _replaced_folder(out))
    os.replace(folder, out)


def _bring_back(out: Path) -> None:
    """Put the old output back if a run stopped between moving it away and the new one in."""
    if _replaced_folder(out).exists() and not out.exists():
        os.replace(_replaced_folder(out), out)


def _sync(folder: Path) -> None:
    """Have all files of `folder` on the disk, so that after a power cut too `out` is whole or absent."""
    for path in (*sorted(folder.rglob("*")), folder):
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _leftover_bytes(out: Path, partial: Path) -> int:
    """Return how much space the next run to `out` will free, having checked that nobody is using it.

    Raises:
        OutputError: if another run is, or the folder is not ours.
    """
    if not partial.exists():
        return 0
    _check_ours(out, partial)
    with suppress(FileNotFoundError):
        descriptor = os.open(partial / LOCK_FILE, os.O_RDWR)
        try:
            _lock(out, partial, descriptor, fcntl.LOCK_SH)
        finally:
            os.close(descriptor)
    # What was in `out` goes back there.
    kept = _replaced_folder(out.resolve()) if not out.exists() else None
    return sum(
        path.stat().st_size
        for path in partial.rglob("*")
        if path.is_file() and not (kept and path.is_relative_to(kept))
    )
