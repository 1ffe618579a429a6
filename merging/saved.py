"""Where coefficients may be saved."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ..common.checkpoint_source import CheckpointSource
from ..common.settings import SettingsError
from ..common.text_files import find_files
from .coefficients import check_coefficients_file
from .settings import MergeSettings


def files_read(settings: MergeSettings) -> Iterator[Path]:
    """Yield the files and folders that a merge reads beside the checkpoints."""
    if settings.coefficients is not None:
        yield settings.coefficients
    if settings.learn is not None and settings.learn.reference is not None:
        yield Path(settings.learn.reference)
    data = settings.text if settings.learn is None else settings.learn.data
    for source in data.data if data else ():
        yield Path(source)
        # Reading it says what is wrong with a source, in its turn.
        with suppress(SettingsError):
            yield from find_files(source, data.split, whole_folders=True)


def check_saved(
    path: Path, sources: Sequence[CheckpointSource], settings: MergeSettings, out: Path, overwrite: bool
) -> None:
    """Check, before anything is read, that coefficients can be saved to `path` beside a merge of `sources` to `out`.

    Args:
        overwrite: whether a file of coefficients may be replaced.

    Raises:
        SettingsError: if not.
    """
    place = path.resolve()
    if path.is_dir() or not place.parent.is_dir():
        raise SettingsError(f"{path}: cannot be a file; give --save-coefficients a path in a folder that exists.")
    if place.is_relative_to(out.resolve()):
        raise SettingsError(f"{path}: lies in {out}, which is written anew; give --save-coefficients another place.")
    for source in sources:
        if place.is_relative_to(source.folder.resolve()):
            raise SettingsError(
                f"{path}: lies in {source.name}, which is read; give --save-coefficients another place."
            )
    if place in {file.expanduser().resolve() for file in files_read(settings)}:
        raise SettingsError(f"{path}: is read by this merge; give --save-coefficients another file.")
    if not os.access(place.parent, os.W_OK):
        raise SettingsError(f"{path}: no permission to write in {place.parent}; give another place.")
    if path.exists():
        if not overwrite:
            raise SettingsError(f"{path}: exists; give another file, or --overwrite to replace it.")
        check_coefficients_file(path)
