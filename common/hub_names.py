"""Names on the Hub: of models, datasets and languages."""

import re
from collections.abc import Iterable
from glob import has_magic
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .text_files import loader_of


# ISO 639-1 or 639-3, which a script or region may follow, and what the Hub has beside them.
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code")


def is_hub_id(name: str) -> bool:
    """Return whether `name` is of the form `org/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def is_language(code: Any) -> bool:
    """Return whether the Hub takes `code` for a language; YAML takes an unquoted `no` for false."""
    return isinstance(code, str) and _LANGUAGE.fullmatch(code) is not None


def is_hub_dataset(name: str) -> bool:
    """Return whether a source of text is a dataset on the Hub, with or without its configuration (`org/name:config`).

    What is here as a file or folder is not, so the answer holds only where and when the text is read: record it then.
    """
    path = Path(name).expanduser()
    is_local = path.exists() or has_magic(name) or loader_of(path) is not None
    return is_hub_id(name.partition(":")[0]) and not is_local


def hub_datasets(names: Iterable[str]) -> list[str]:
    """Return the ids of those sources of text that are datasets on the Hub, each once; see [`is_hub_dataset`]."""
    return list(dict.fromkeys(name.partition(":")[0] for name in names if is_hub_dataset(name)))
