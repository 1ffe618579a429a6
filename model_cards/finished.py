"""A card that a person asked for: checked, with its pictures, and written beside the weights or elsewhere."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..common.files import replacing
from ..common.settings import SettingsError
from .analysis import FIGURES_FOLDER
from .card import is_replaceable, render_card, save_card
from .checkpoint import read_checkpoint
from .extras import CardExtras
from .validation import card_problems


@dataclass(frozen=True)
class FinishedCard:
    """A card and where it will be.

    Args:
        pictures: where they come from, by where they will be.
    """

    text: str
    path: Path
    pictures: Mapping[Path, Path]

    def to_dict(self) -> dict[str, Any]:
        """Return the card for JSON: its file, its metadata and its pictures."""
        return {
            "file": str(self.path),
            "metadata": ModelCard(self.text).data.to_dict(),
            "pictures": [str(path) for path in self.pictures],
        }

    def write(self, *, overwrite: bool = False) -> None:
        """Write the card, whole or not at all, after its pictures.

        Args:
            overwrite: whether a card that a person wrote or edited may be replaced.

        Raises:
            SettingsError: if there is such a card.
            OSError: if it cannot be written.
        """
        self.check(overwrite=overwrite)
        for target, source in self.pictures.items():
            target.parent.mkdir(exist_ok=True)
            with replacing(target) as partial:
                shutil.copyfile(source, partial)
        save_card(self.text, self.path)

    def check(self, *, overwrite: bool = False) -> None:
        """Check that nothing of a person's would be lost.

        Raises:
            SettingsError: if there is a card that was written or edited by one, and not `overwrite`.
        """
        if not overwrite and not is_replaceable(self.path):
            raise SettingsError(
                f"{self.path}: was written or edited by hand; give --overwrite to replace it, or another file with "
                "--output."
            )


def finish_card(folder: Path, extras: CardExtras, path: Path) -> FinishedCard:
    """Return the card of the checkpoint in `folder` for the file `path`.

    Raises:
        SettingsError: if there is no checkpoint, or the Hub would not take the card.
    """
    text = render_card(read_checkpoint(folder), extras)
    if problems := card_problems(text):
        raise SettingsError(f"the card would not be valid: {problems[0]}")
    shown = {} if extras.analysis is None else extras.analysis.pictures
    pictures = {path.parent / FIGURES_FOLDER / source.name: source for source in shown}
    return FinishedCard(
        text, path, {target: source for target, source in pictures.items() if target.resolve() != source.resolve()}
    )
