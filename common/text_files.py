"""Which files and datasets text comes from, and the domain that the place of each says."""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .settings import SettingsError


# What `datasets` calls the loader of each kind of file.
LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".txt": "text"}
COMPRESSIONS = (".gz", ".zst")
SPLITS = ("train", "validation", "test")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?$")


@dataclass(frozen=True)
class TextPlace:
    """Where text lies.

    Args:
        name: File, or dataset on the Hub.
        file: The file; None for a dataset on the Hub.
        domain: Domain of the documents that do not say theirs.
    """

    name: str
    file: Path | None
    domain: str


@dataclass(frozen=True)
class _Unnamed:
    """A place before it has a domain.

    Args:
        folder: The absolute folder that may be its domain, without splits; of a dataset on the Hub its id.
        own_name: What else may be its domain; None if nothing.
    """

    name: str
    file: Path | None
    folder: Path
    own_name: str | None

    def domain(self, depth: int) -> str:
        """Return its own name, or for a `depth` above 0, or without one, the last `depth` parts of its folder."""
        if self.own_name is not None and depth == 0:
            return self.own_name
        return "/".join(_parts(self.folder)[-max(depth, 1) :])


def find_text(sources: Sequence[str], split: str = "train", whole_folders: bool = False) -> list[TextPlace]:
    """Return all files and datasets that `sources` name, in order, each with its domain.

    The domain of a file is the sub-folder that it lies in, in a folder that is given; else its name without its split;
    else, for a name that says a split only, the name of its folder. That of a dataset is its name. Places in different
    folders never share a domain by chance: where they would, the names of their folders are taken instead, with as
    many folders above them as tell them apart.

    Args:
        sources: Files, folders, globs and Hub datasets; see `open_text`.
        split: Split to read in folders.
        whole_folders: Read all files of a folder in which none names a split.

    Raises:
        SettingsError: if there are none, or one is missing or of an unknown kind.
    """
    if not sources:
        raise SettingsError("No text is given; name files, folders or Hub datasets.")
    places: list[_Unnamed] = []
    for source in sources:
        files = find_files(source, split, whole_folders)
        root = Path(source).expanduser()
        places += [_unnamed_file(file, root if root.is_dir() else file.parent) for file in files]
        if not files:
            name, _, config = source.partition(":")
            places.append(_Unnamed(source, None, Path(name, config), name.split("/")[-1]))
    depths = _depths(places)
    return [TextPlace(place.name, place.file, place.domain(depths[place.folder])) for place in places]


def _depths(places: Sequence[_Unnamed]) -> dict[Path, int]:
    """Return how many parts of each folder its domain takes, the fewest that tell folders apart."""
    depths = dict.fromkeys((place.folder for place in places), 0)
    while True:
        folders: dict[str, set[Path]] = defaultdict(set)
        for place in places:
            folders[place.domain(depths[place.folder])].add(place.folder)
        clashing = {folder for same in folders.values() if len(same) > 1 for folder in same}
        clashing = {folder for folder in clashing if depths[folder] < len(_parts(folder))}
        if not clashing:
            return depths
        for folder in clashing:
            depths[folder] += 1


def _unnamed_file(file: Path, root: Path) -> _Unnamed:
    sub_folders = [part for part in _sub_folders(file, root) if part not in SPLITS]
    folder = Path(os.path.abspath(root), *sub_folders[:1])
    folder = Path(*(part for part in folder.parts if part not in SPLITS))
    stem = _stem(file)
    own_name = None if sub_folders or stem in SPLITS else re.sub(rf"_({'|'.join(SPLITS)})$", "", stem)
    return _Unnamed(str(file), file, folder, own_name if _parts(folder) else stem)


def _parts(folder: Path) -> tuple[str, ...]:
    return folder.relative_to(folder.anchor).parts


def find_files(source: str, split: str = "train", whole_folders: bool = False) -> list[Path]:
    """Return the files that `source` names, sorted; none if it looks like a Hub dataset.

    Raises:
        SettingsError: if it is neither, or a file is of an unknown kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _files_of_split(source, path, split, whole_folders)
    if path.is_file():
        files = [path]
    elif glob.has_magic(source):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise SettingsError(f"{source}: no file matches this pattern.")
    elif _HUB_ID.match(source) and loader_of(path) is None:
        return []
    else:
        raise SettingsError(
            f"{source}: no such file or folder, and not a Hub dataset like org/name or org/name:config."
        )
    for file in files:
        if loader_of(file) is None:
            raise SettingsError(f"{file}: unknown kind of text file; known are {', '.join(LOADERS)}.")
    return files


def _files_of_split(source: str, folder: Path, split: str, whole_folders: bool) -> list[Path]:
    splits = {file: _split_of(file, folder) for file in sorted(folder.rglob("*")) if loader_of(file)}
    if not splits:
        raise SettingsError(f"{source}: no text in this folder; files are {', '.join(LOADERS)}.")
    if whole_folders and set(splits.values()) == {None}:
        return list(splits)
    files = [file for file, found in splits.items() if (found or "train") == split]
    if not files:
        found = ", ".join(sorted({found or "train" for found in splits.values()}))
        raise SettingsError(
            f"{source}: no {split} text in this folder, its files are of {found}; choose that split (--split, or the "
            "setting of that name), or name files or a glob, which are read as they are."
        )
    return files


def loader_of(file: Path) -> str | None:
    """Return what `datasets` calls the loader of `file`, or None if it is of an unknown kind."""
    return LOADERS.get(Path(_uncompressed_name(file)).suffix)


def how_to_load(file: Path, text_column: str) -> tuple[str, dict[str, str], str]:
    """Return the loader of `file`, its options, and the column of the text."""
    loader = loader_of(file)
    return (loader, {"sample_by": "document"}, "text") if loader == "text" else (loader, {}, text_column)


def _uncompressed_name(file: Path) -> str:
    is_compressed = file.suffix in COMPRESSIONS and Path(file.stem).suffix != ".parquet"
    return file.stem if is_compressed else file.name


def _stem(file: Path) -> str:
    """Return the name without what says its kind and, as on the Hub, which part of a text it is."""
    return re.sub(r"-\d{5}-of-\d{5}$", "", Path(_uncompressed_name(file)).stem)


def _split_of(file: Path, folder: Path) -> str | None:
    """Return the split that the name of `file` or of a sub-folder says, or None."""
    name = _stem(file)
    named = (split for split in SPLITS if name == split or name.endswith(f"_{split}"))
    return next(named, None) or next((part for part in _sub_folders(file, folder) if part in SPLITS), None)


def _sub_folders(file: Path, folder: Path) -> tuple[str, ...]:
    return file.relative_to(folder).parts[:-1]
