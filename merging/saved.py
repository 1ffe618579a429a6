"""Where coefficients may be saved."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..common.moe_source import MoeSource
from ..common.settings import SettingsError
from ..common.text_files import find_files
from .coefficients import check_coefficients_file
from .settings import MergeSettings


def files_read(settings: MergeSettings) -> Iterator[Path]:
    """Yield the files that a merge reads beside the checkpoint."""
    if settings.coefficients is not None:
        yield settings.coefficients
    for source in settings.text.data if settings.text else ():
        yield Path(source)
        # Reading it says what is wrong with a source, in its turn.
        with suppress(SettingsError):
            yield from find_files(source, settings.text.split, whole_folders=True)


def check_saved(path: Path, source: MoeSource, settings: MergeSettings, out: Path, overwrite: bool) -> None:
    """Check, before anything is read, that coefficients can be saved to `path` beside a merge of `source` to `out`.

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
    if place.is_relative_to(source.folder.resolve()):
        raise SettingsError(f"{path}: lies in {source.name}, which is read; give --save-coefficients another place.")
    if place in {file.expanduser().resolve() for file in files_read(settings)}:
        raise SettingsError(f"{path}: is read by this merge; give --save-coefficients another file.")
    if not os.access(place.parent, os.W_OK):
        raise SettingsError(f"{path}: no permission to write in {place.parent}; give another place.")
    if path.exists():
        if not overwrite:
            raise SettingsError(f"{path}: exists; give another file, or --overwrite to replace it.")
        check_coefficients_file(path)
