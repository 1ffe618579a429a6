"""The model card of a checkpoint, filled from what lies beside its weights.

A card ends in a comment with a digest of its text, by which edits of people are told from what was written here.
What a person declared with flags stands in a comment before it, so that later cards can keep it.
"""

import hashlib
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..common.files import replacing, write_text
from .checkpoint import Checkpoint, read_checkpoint
from .extras import CardExtras
from .metadata import model_card_data
from .sections import sections


CARD_FILE = "README.md"
_MARK = re.compile(r"\n<!-- upcycled-moe card ([0-9a-f]{12}) -->\n\Z")
_DECLARED = re.compile(r"\n<!-- declared (\{.*\}) -->\n\Z")


def write_card(folder: Path, source: Path | None = None) -> None:
    """Write the model card of the checkpoint in `folder`, which is being made, into it.

    Args:
        source: the checkpoint that it is made of; what was declared of its terms holds on.

    Raises:
        SettingsError: if `folder` holds no checkpoint.
        OSError: if it cannot be written.
    """
    declared = {} if source is None else declared_in(source / CARD_FILE)
    # Another model has another name.
    declared.pop("title", None)
    extras = CardExtras().with_earlier(declared)
    write_text(folder / CARD_FILE, render_card(read_checkpoint(folder), extras))


def update_card(folder: Path) -> bool:
    """Write the model card into a `folder` that stands, unless a person wrote or edited one; return whether it was.

    Raises:
        SettingsError: if `folder` holds no checkpoint.
        OSError: if it cannot be written.
    """
    if not is_replaceable(folder / CARD_FILE):
        return False
    extras = CardExtras().with_earlier(declared_in(folder / CARD_FILE))
    save_card(render_card(read_checkpoint(folder), extras), folder / CARD_FILE)
    return True


def save_card(text: str, path: Path) -> None:
    """Write the card `text` to `path`, whole or not at all."""
    with replacing(path) as partial:
        write_text(partial, text)


def render_card(checkpoint: Checkpoint, extras: CardExtras | None = None) -> str:
    """Return the model card of `checkpoint`."""
    extras = extras or CardExtras()
    data = model_card_data(checkpoint, extras)
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(files(__package__).joinpath("template.md").read_text(encoding="utf-8"))
    body = template.render(sections(checkpoint, extras, data))
    # An optional part that is left out leaves its empty lines.
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    text = f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{body}\n"
    if extras.declared:
        # No value can end the comment.
        declared = json.dumps(extras.declared, ensure_ascii=False).replace(">", "\\u003e")
        text += f"\n<!-- declared {declared} -->\n"
    return f"{text}\n<!-- upcycled-moe card {_digest(text)} -->\n"


def is_replaceable(path: Path) -> bool:
    """Return whether nothing of a person's would be lost with the card at `path`: there is none, or it is as made."""
    return not path.exists() or made_text(path) is not None


def made_text(path: Path) -> str | None:
    """Return the text of the card at `path` without its mark; None if there is none, or one that a person edited."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    mark = _MARK.search(text)
    is_as_made = mark is not None and mark[1] == _digest(text[: mark.start()])
    return text[: mark.start()] if is_as_made else None


def declared_in(path: Path) -> dict[str, Any]:
    """Return what a person declared for the card at `path`; nothing if it is not as it was made."""
    declared = _DECLARED.search(made_text(path) or "")
    return {} if declared is None else json.loads(declared[1])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]
