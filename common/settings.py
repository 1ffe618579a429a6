"""Strict settings: a YAML file and command-line overrides, where a misspelt key is an error and not a silence."""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml


# Of a weight file that is written, unless said otherwise.
MAX_SHARD_SIZE = "5GB"


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but `1e-4` is a number: without a dot it would be read as text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


class SettingsError(ValueError):
    """A setting that the user has to change: unknown, of the wrong type, or impossible with the others."""


def check_keys(settings: Mapping[str, Any], allowed: Collection[str], where: str) -> None:
    """Check that every key of `settings` is in `allowed`; `where` names their origin in the message.

    Raises:
        SettingsError: at the first unknown key, with the allowed key nearest to it.
    """
    for key in settings:
        if key not in allowed:
            similar = get_close_matches(str(key), allowed, n=1)
            hint = f"did you mean {similar[0]!r}?" if similar else f"allowed: {', '.join(sorted(allowed))}."
            raise SettingsError(f"{where}: unknown key {key!r}; {hint}")


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in the YAML file `path`.

    Raises:
        SettingsError: if the file is missing, not YAML, or not a mapping.
    """
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not a YAML file ({' '.join(str(error).split())}).") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise SettingsError(f"{path}: expected keys and values, got {type(settings).__name__}.")
    return settings


def parse_override(argument: str) -> tuple[str, Any]:
    """Return key and value of a `key=value` argument; the value is read as YAML, so `1e-4` and `[a, b]` work.

    Raises:
        SettingsError: if there is no `=`, no key, or the value is not YAML.
    """
    key, separator, text = argument.partition("=")
    if not separator or not key.isidentifier():
        raise SettingsError(f"{argument!r}: expected key=value.")
    try:
        return key, yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SettingsError(f"{argument!r}: the value is not YAML ({' '.join(str(error).split())}).") from error


def parse_size(name: str, text: str) -> int:
    """Return the bytes that `text` says, e.g. 5GB (kB, MB, GB and TB are powers of 1000, KiB to TiB of 1024).

    Raises:
        SettingsError: if it is no size above zero; the message calls the setting `name`.
    """
    number = text.strip().rstrip("KMGTiBkmgtb")
    units = {"": 1, "B": 1}
    for power, prefix in enumerate("KMGT", start=1):
        units[f"{prefix}B"] = 1000**power
        units[f"{prefix}IB"] = 1024**power
    unit = text.strip()[len(number) :].upper()
    try:
        size = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise SettingsError(f"{name}={text!r} is not a size; write e.g. 500MB or 5GB.") from None
    if size < 1:
        raise SettingsError(f"{name}={text!r} must be above zero.")
    return size
