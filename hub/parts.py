"""What belongs to a checkpoint on the Hub, by the names of files: what loads it, what it shows, what it reports."""

import json
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from ..common.companions import COMPANION_FILES, COMPANION_FOLDERS, TOKENIZER_SETTINGS
from ..common.output_folder import FolderKind
from ..common.provenance import PROVENANCE_FILE
from ..common.settings import SettingsError
from ..common.streaming.stored import read_config
from ..model_cards.analysis import ANALYSIS_FILE, FIGURES_FOLDER
from ..model_cards.card import CARD_FILE
from ..model_cards.evaluation import EVALUATION_FILE
from ..model_cards.pictures import local_pictures
from ..model_cards.training import SETTINGS_FILE


CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
REPORT_PAGE = "report.html"
# Other programs write files of these names too.
EVALUATION = FolderKind("evaluation", (EVALUATION_FILE,), frozenset({"checkpoints", "tasks", "settings"}))
ANALYSIS = FolderKind("analysis", (ANALYSIS_FILE,), frozenset({"checkpoints", "domains", "format"}))
LEGAL_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")

# What `from_pretrained` of a model, tokenizer, processor or generation configuration looks for, and our commands: of
# an earlier model, it would change this one. Patterns do not match beyond a slash.
_LOADED = (
    CONFIG_FILE,
    PROVENANCE_FILE,
    "model*.safetensors",
    INDEX_FILE,
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
    "adapter_config.json",
    "adapter_model.*",
    *(name for name in COMPANION_FILES if name not in LEGAL_FILES),
    "tokenizer*.model",
    "vocab.txt",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    *(f"{name}/*.jinja" for name in COMPANION_FOLDERS),
    "custom_generate/*.py",
)
_PICTURE_SUFFIXES = frozenset({".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp", ".avif", ".bmp"})
# As Transformers looks for them.
_RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import\b|import\s+\.(\S+)\s*$)", re.MULTILINE)


def is_loaded(path: str) -> bool:
    """Return whether what is loaded from a repository can depend on its file `path`."""
    return any(path.count("/") == pattern.count("/") and fnmatchcase(path, pattern) for pattern in _LOADED)


def is_weights(path: str) -> bool:
    """Return whether the file `path` of a repository is one that Transformers could take a model's weights from."""
    return path == INDEX_FILE or (fnmatchcase(path, "model*.safetensors") and "/" not in path)


def chat_templates(folder: Path) -> set[str]:
    """Return the paths of the chat templates beside the first one."""
    return {
        path.relative_to(folder).as_posix()
        for name in COMPANION_FOLDERS
        for path in (folder / name).glob("*.jinja")
        if not path.name.startswith(".")
    }


def reports(folder: Path) -> set[str]:
    """Return the names of the results that our commands put into `folder`, and the settings of a training."""
    found = {SETTINGS_FILE}
    found |= {EVALUATION_FILE} if EVALUATION.is_in(folder) else set()
    return found | ({ANALYSIS_FILE, REPORT_PAGE} if ANALYSIS.is_in(folder) else set())


def pictures(card: str) -> set[str]:
    """Return the paths of the pictures that the card shows from beside it, or from the folder of its figures."""
    paths = {path: path.removeprefix(f"{FIGURES_FOLDER}/") for path in local_pictures(card)}
    return {
        path
        for path, name in paths.items()
        if "/" not in name and not name.startswith(".") and PurePosixPath(name).suffix.lower() in _PICTURE_SUFFIXES
    }


def code_files(folder: Path) -> set[str]:
    """Return the names of the code that the configurations name, and of what that imports from beside it.

    Raises:
        SettingsError: if some of it is missing, or no code.
    """
    modules = _named_modules(folder, CONFIG_FILE, read_config(str(folder), folder))
    if (folder / TOKENIZER_SETTINGS).is_file():
        modules |= _named_modules(folder, TOKENIZER_SETTINGS, _read_json(folder / TOKENIZER_SETTINGS))
    found: set[str] = set()
    while modules:
        module, where = modules.pop()
        path = folder / f"{module}.py"
        if path.name in found:
            continue
        if not re.fullmatch(r"\w+", module) or not path.is_file():
            raise SettingsError(f"{where}: needs {module}.py, which is not beside it; put it there.")
        found.add(path.name)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SettingsError(f"{path}: not UTF-8 ({error.reason}), so nothing can load it; correct it.") from None
        modules |= {(one or other, path) for one, other in _RELATIVE_IMPORT.findall(text)}
    return found


def _named_modules(folder: Path, file_name: str, settings: Any) -> set[tuple[str, Path]]:
    """Return the modules of which the `auto_map` in `settings` names classes, with the file that says so."""
    path = folder / file_name
    auto_map = (settings.get("auto_map") if isinstance(settings, dict) else None) or {}
    # A tokenizer has two classes, of which one may be none; old ones have nothing but these.
    values = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    names = [name for value in values for name in (value if isinstance(value, list) else [value]) if name is not None]
    if not all(isinstance(name, str) and "." in name for name in names):
        raise SettingsError(f"{path}: auto_map is {auto_map!r} instead of names of classes; correct it.")
    # Code of another repository is before a `--`, and stays there.
    return {(name.rpartition(".")[0], path) for name in names if "--" not in name}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"{path}: not valid JSON ({error}); correct it.") from None


def required(folder: Path, weights: Iterable[str], code: Iterable[str]) -> set[str]:
    """Return the paths of what the checkpoint in `folder` cannot go without; of tokenizers, what it has."""
    companions = (name for name in (PROVENANCE_FILE, *COMPANION_FILES) if name not in LEGAL_FILES)
    there = {name for name in companions if (folder / name).is_symlink() or (folder / name).exists()}
    return {CONFIG_FILE, CARD_FILE, *weights, *code, *there, *chat_templates(folder)}
