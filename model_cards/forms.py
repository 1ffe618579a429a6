"""The form of what is read from JSON: checked once, as files may be edited or of another version."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.settings import SettingsError


NUMBER = (int, float)
NUMBER_OR_NONE = (int, float, type(None))
_NAMES = {
    str: "text",
    int: "a whole number",
    NUMBER: "a number",
    NUMBER_OR_NONE: "a number or null",
    bool: "true or false",
}


def check_form(content: Any, form: Any, file: Path) -> None:
    """Check that `content` of `file` has the `form`.

    Args:
        form: a type, or several; `[form]` for a list of such; for an object a form by key. A key with `?` may be
            missing or null, and `...` stands for all keys that are not named. Others may be there too.

    Raises:
        SettingsError: if not.
    """
    problem = next(_problems(content, form, ""), None)
    if problem is not None:
        raise SettingsError(f"{file}: {problem}; correct it, or make the file anew.")


def _problems(content: Any, form: Any, place: str) -> Iterator[str]:
    kind = type(form) if isinstance(form, list | dict) else form
    if not isinstance(content, kind):
        expected = {list: "a list", dict: "an object"}.get(kind) or _NAMES[form]
        found = "null" if content is None else f"of type {type(content).__name__}"
        yield f"{place or 'its content'} is {found} instead of {expected}"
    elif isinstance(form, list):
        for number, value in enumerate(content):
            yield from _problems(value, form[0], f"{place}[{number}]")
    elif isinstance(form, dict):
        yield from _problems_of_keys(content, form, f"{place}." if place else "")


def _problems_of_keys(content: dict[str, Any], form: dict[Any, Any], prefix: str) -> Iterator[str]:
    named = {key.removesuffix("?"): key for key in form if key is not ...}
    for name, key in named.items():
        if content.get(name) is not None or (name in content and name == key):
            yield from _problems(content[name], form[key], prefix + name)
        elif name == key:
            yield f"{prefix}{name} is missing"
    for name in content.keys() - named.keys() if ... in form else ():
        yield from _problems(content[name], form[...], prefix + name)
