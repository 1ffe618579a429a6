"""The pictures that a model card shows from beside it."""

import re
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit


# A place in angle brackets, or up to a space; a title may follow.
_PLACE = r"""\s*(?:<([^<>\n]+)>|([^\s<>()]+(?:\([^\s()]*\)[^\s<>()]*)*))(?:\s+(?:"[^"]*"|'[^']*'|\([^)]*\)))?\s*"""
_INLINE = re.compile(rf"!\[[^\]]*\]\({_PLACE}\)")
_HTML = re.compile(r"""<img\b[^>]*?\ssrc\s*=\s*(?:"([^"]+)"|'([^']+)'|([^\s"'>]+))""", re.IGNORECASE)
# `![text][name]`, `![name][]` or `![name]`, and elsewhere `[name]: place`.
_REFERENCE = re.compile(r"!\[([^\]]*)\](?:\[([^\]]*)\])?(?!\()")
_DEFINITION = re.compile(rf"^ {{0,3}}\[([^\]]+)\]:{_PLACE}$", re.MULTILINE)
_CODE = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1[^\n]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def local_pictures(text: str) -> list[str]:
    """Return the paths of the pictures that the card `text` shows by a relative path, in order, each once.

    In Markdown, with titles and by reference, and in the HTML that it may hold; not what stands in code.
    """
    paths = (_path(place) for place in _places(_CODE.sub("", text)))
    return list(dict.fromkeys(path for path in paths if path is not None))


def _places(text: str) -> Iterator[str]:
    for pattern in (_INLINE, _HTML):
        for match in pattern.finditer(text):
            yield next(group for group in match.groups() if group)
    defined = {name.casefold(): bracketed or plain for name, bracketed, plain in _DEFINITION.findall(text)}
    for shown, name in _REFERENCE.findall(text):
        if place := defined.get((name or shown).casefold()):
            yield place


def _path(place: str) -> str | None:
    """Return the path that the address `place` means, None if it is not relative."""
    try:
        address = urlsplit(place)
    except ValueError:
        return None
    if address.scheme or address.netloc or not address.path:
        return None
    return unquote(address.path).removeprefix("./")
