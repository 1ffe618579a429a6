"""What lies beside the weights and comes along: the tokenizer's files, generation settings, licences."""

import json
import shutil
from pathlib import Path
from typing import Any

from ..common.progress import Progress
from ..common.settings import SettingsError
from .source import COMPANION_FILES, COMPANION_FOLDERS, DenseSource
from .writer import write_text


TOKENIZER_SETTINGS = "tokenizer_config.json"


def copy_companions(source: DenseSource, folder: Path) -> None:
    """Copy into `folder` what `source` has beside its weights, byte by byte."""
    for name in COMPANION_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    for name in COMPANION_FOLDERS:
        if (source.folder / name).is_dir():
            shutil.copytree(source.folder / name, folder / name)


def tokenizer_class_to_declare(source: DenseSource, config: Any, progress: Progress) -> str | None:
    """Return the class to declare, so that a model with `config` has the tokenizer that `source` has.

    None if nothing need be declared anew. Transformers loads the tokenizer of a Qwen2 model, and that of a Qwen3 model
    without a declared class, as Qwen2Tokenizer; that of a model type it does not know as declared. So the same files
    can cut text into other tokens beside the converted model.
    """
    declared = _tokenizer_settings(source.folder).get("tokenizer_class")
    # That class is given to both, and most checkpoints declare it: nothing need be loaded.
    if not source.has_tokenizer or str(declared).removesuffix("Fast") == "Qwen2Tokenizer":
        return None

    # Imported here: most conversions need no tokenizer.
    from ..common.checkpoints import load_tokenizer

    try:
        expected = type(load_tokenizer(str(source.folder))).__name__
    except SettingsError as error:
        progress.warn(f"{error} The tokenizer's files are carried over as they are.")
        return None
    try:
        actual = type(load_tokenizer(str(source.folder), config=config)).__name__
    except SettingsError:
        actual = None
    if actual == expected:
        return None
    progress.warn(
        f"{source.name}: its tokenizer declares {declared or 'no class'}, and Transformers loads it as {expected}, "
        f"but beside the converted model as declared; the result declares {expected}, so that both cut text alike."
    )
    return expected


def declare_tokenizer_class(folder: Path, name: str) -> None:
    """Let the tokenizer in `folder` be loaded as the class `name`; its other settings stay."""
    settings = _tokenizer_settings(folder) | {"tokenizer_class": name}
    write_text(folder / TOKENIZER_SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _tokenizer_settings(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise SettingsError(f"{path}: not valid JSON ({error}); fetch it again.") from None
    if not isinstance(settings, dict):
        raise SettingsError(f"{path}: holds a {type(settings).__name__} instead of settings; fetch it again.")
    return settings
