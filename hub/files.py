"""Which files of a checkpoint's folder go to the Hub: those known to belong to it, and nothing else.

A list of what may go up, not of what may not: a folder of a run also holds optimizers, logs, perhaps a file with
tokens, and what is up cannot be called back. What stays behind is listed, with the reason.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.companions import COMPANION_FILES, COMPANION_FOLDERS
from ..common.output_folder import LOCK_FILE, staging_folder
from ..common.provenance import PROVENANCE_FILE
from ..common.settings import SettingsError
from ..common.streaming.stored import read_config, read_tensors
from ..model_cards.analysis import ANALYSIS_FILE, FIGURES_FOLDER
from ..model_cards.card import CARD_FILE
from ..model_cards.evaluation import EVALUATION_FILE
from ..model_cards.training import SETTINGS_FILE
from ..model_cards.validation import card_problems


CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Results that our commands write, and the settings of a training: no state of a run, and nothing that runs.
RESULT_FILES = (EVALUATION_FILE, ANALYSIS_FILE, "report.html", SETTINGS_FILE)

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
# Pictures in Markdown, and in the HTML that Markdown may hold.
_PICTURE = re.compile(r"""!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img\b[^>]*?\bsrc\s*=\s*["']([^"']+)""")
_PICTURE_SUFFIXES = (".png", ".svg", ".jpg")
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", re.MULTILINE)


@dataclass(frozen=True)
class UploadFile:
    """A file that goes up: its path in the folder, with slashes, and its size."""

    path: str
    num_bytes: int


@dataclass(frozen=True)
class LeftOut:
    """What stays behind: a file, or a folder (its path ends in a slash) with all that is in it."""

    path: str
    reason: str


@dataclass(frozen=True)
class Upload:
    """What of `folder` goes to the Hub, and what does not; both by path."""

    folder: Path
    files: tuple[UploadFile, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)

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
    weights = _check_whole(folder)
    wanted = _wanted_files(folder, weights)
    files, left_out = [], []
    for path in _walk(folder, wanted):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink() or path.is_dir() or relative not in wanted:
            left_out.append(LeftOut(relative + "/" * (path.is_dir() and not path.is_symlink()), _reason(path)))
        else:
            files.append(UploadFile(relative, path.stat().st_size))
    missing = {CONFIG_FILE, CARD_FILE, *weights} - {file.path for file in files}
    if missing:
        raise SettingsError(
            f"{folder / min(missing)}: is a link, and only plain files go to the Hub; put a copy in its place."
        )
    return Upload(folder, tuple(files), tuple(left_out))


def is_weights(path: str) -> bool:
    """Return whether the file `path` of a repository is one that Transformers could take a model's weights from."""
    return path == INDEX_FILE or (fnmatchcase(path, "model*.safetensors") and "/" not in path)


def _check_whole(folder: Path) -> set[str]:
    """Return the names of the weight files of the checkpoint in `folder`, all of them there and none cut short."""
    if not folder.is_dir():
        raise SettingsError(f"{folder}: no such folder; give the folder of a checkpoint.")
    place = folder.resolve()
    if (place / LOCK_FILE).exists() or any(parent.name.endswith(".partial") for parent in (place, place.parent)):
        raise SettingsError(f"{folder}: is what a command has not finished writing; run that command again.")
    if (staging_folder(place) / LOCK_FILE).exists():
        raise SettingsError(
            f"{folder}: a command is replacing it, or was killed as it did ({staging_folder(folder)}); wait for it, "
            "or run it again."
        )
    read_config(str(folder), folder)
    if (folder / "adapter_config.json").exists():
        raise SettingsError(f"{folder}: holds an adapter; merge it into its model and save that.")
    names = {tensor.path.name for tensor in read_tensors(folder).values()}
    _check_card(folder)
    return names if names == {WEIGHTS_FILE} else {*names, INDEX_FILE}


def _check_card(folder: Path) -> None:
    path = folder / CARD_FILE
    if not path.is_file():
        raise SettingsError(f"{folder}: there is no card ({CARD_FILE}); write one with `upcycled-moe card {folder}`.")
    if problems := card_problems(path.read_text(encoding="utf-8", errors="replace"), folder):
        more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        raise SettingsError(
            f"{path}: {problems[0].rstrip('.')}{more}; correct it, or write another with `upcycled-moe card {folder}`."
        )


def _wanted_files(folder: Path, weights: set[str]) -> set[str]:
    """Return the paths of what may go up, whether or not it is there."""
    card = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")
    chat_templates = {
        path.relative_to(folder).as_posix()
        for name in COMPANION_FOLDERS
        for path in (folder / name).glob("*.jinja")
        if not path.name.startswith(".")
    }
    return {
        *weights,
        CONFIG_FILE,
        CARD_FILE,
        PROVENANCE_FILE,
        *COMPANION_FILES,
        *RESULT_FILES,
        *_code_files(folder),
        *_pictures(card),
        *chat_templates,
    }


def _code_files(folder: Path) -> set[str]:
    """Return the names of the code that `config.json` names, and of what that imports from beside it."""
    auto_map = read_config(str(folder), folder).get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise SettingsError(
            f"{folder / CONFIG_FILE}: auto_map is {auto_map!r} instead of names of classes; correct it."
        )
    modules = {str(name).rpartition(".")[0] for name in auto_map.values() if "--" not in str(name)}
    found: set[str] = set()
    while modules:
        name = f"{modules.pop()}.py"
        if name not in found and "/" not in name and (folder / name).is_file():
            found.add(name)
            modules |= set(_RELATIVE_IMPORT.findall((folder / name).read_text(encoding="utf-8")))
    return found


def _pictures(card: str) -> set[str]:
    """Return the paths of the pictures that the card shows from beside it, or from the folder of its figures."""
    paths = {(markdown or html).removeprefix("./") for markdown, html in _PICTURE.findall(card)}
    names = {path: path.removeprefix(f"{FIGURES_FOLDER}/") for path in paths if path.endswith(_PICTURE_SUFFIXES)}
    return {path for path, name in names.items() if "/" not in name and not name.startswith(".")}


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
    known = (reason for pattern, reason in _REASONS if fnmatchcase(path.name, pattern))
    return next(known, "not known as part of a checkpoint")
