"""What lies beside the weights and comes along: the tokenizer's files, generation settings, licences."""

import json
import shutil
from pathlib import Path
from typing import Any

from .files import write_text
from .progress import Progress
from .settings import SettingsError


# Carried over untouched, if they are there.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
COMPANION_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
COMPANION_FOLDERS = ("additional_chat_templates",)
TOKENIZER_SETTINGS = "tokenizer_config.json"


def has_tokenizer(folder: Path) -> bool:
    """Return whether a tokenizer lies in `folder`."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy into `folder` what lies beside the weights in the folder `source`, byte by byte."""
    for name in COMPANION_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for name in COMPANION_FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)


def tokenizer_class_to_declare(name: str, source: Path, config: Any, progress: Progress) -> str | None:
    """Return the class to declare, so that a model with `config` has the tokenizer that `source` has.

    Args:
        name: what the user called the checkpoint in the folder `source`.
        config: of the model that the tokenizer's files will lie beside.

    None if nothing need be declared anew. Transformers loads the tokenizer of a Qwen2 model, and that of a Qwen3 model
    without a declared class, as Qwen2Tokenizer; that of a model type it does not know as declared. So the same files
    can cut text into other tokens beside the converted model.
    """
    declared = _tokenizer_settings(source).get("tokenizer_class")
    # That class is given to both, and most checkpoints declare it: nothing need be loaded.
    if not has_tokenizer(source) or str(declared).removesuffix("Fast") == "Qwen2Tokenizer":
        return None

    # Imported here: most conversions need no tokenizer.
    from .checkpoints import load_tokenizer

    try:
        expected = type(load_tokenizer(str(source))).__name__
    except SettingsError as error:
        progress.warn(f"{error} The tokenizer's files are carried over as they are.")
        return None
    try:
        actual = type(load_tokenizer(str(source), config=config)).__name__
    except SettingsError:
        actual = None
    if actual == expected:
        return None
    progress.warn(
        f"{name}: its tokenizer declares {declared or 'no class'}, and Transformers loads it as {expected}, "
        f"but beside the new model as declared; the result declares {expected}, so that both cut text alike."
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
