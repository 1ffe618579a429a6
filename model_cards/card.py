"""The model card of a checkpoint, filled from what lies beside its weights.

A card ends in a comment with a digest of its text, by which edits of people are told from what was written here.
"""

import hashlib
import re
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from ..common.files import replacing, write_text
from .checkpoint import Checkpoint, read_checkpoint
from .extras import CardExtras
from .metadata import model_card_data
from .sections import sections


CARD_FILE = "README.md"
_MARK = re.compile(r"\n<!-- upcycled-moe card ([0-9a-f]{12}) -->\n\Z")


def write_card(folder: Path) -> None:
    """Write the model card of the checkpoint in `folder`, which is being made, into it.

    Raises:
        SettingsError: if `folder` holds no checkpoint.
        OSError: if it cannot be written.
    """
    write_text(folder / CARD_FILE, render_card(read_checkpoint(folder)))


def update_card(folder: Path) -> bool:
    """Write the model card into a `folder` that stands, unless a person wrote or edited one; return whether it was.

    Raises:
        SettingsError: if `folder` holds no checkpoint.
        OSError: if it cannot be written.
    """
    if not is_replaceable(folder / CARD_FILE):
        return False
    save_card(render_card(read_checkpoint(folder)), folder / CARD_FILE)
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
    return f"{text}\n<!-- upcycled-moe card {_digest(text)} -->\n"


def is_replaceable(path: Path) -> bool:
    """Return whether nothing of a person's would be lost with the card at `path`: there is none, or it is as made."""
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return True
    except UnicodeDecodeError:
        return False
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:12]
