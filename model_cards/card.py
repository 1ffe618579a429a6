"""The model card of a checkpoint, filled from what lies beside its weights."""

from pathlib import Path

from ..common.files import write_text


CARD_FILE = "README.md"


def write_card(folder: Path) -> None:
    """Write the model card of the checkpoint in `folder` into it."""
    write_text(folder / CARD_FILE, f"# {folder.resolve().name}\n")
