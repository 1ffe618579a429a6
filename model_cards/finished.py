"""A card that a person asked for: checked, with its pictures, and written beside the weights or elsewhere."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..common.files import replacing
from ..common.settings import SettingsError
from .analysis import FIGURES_FOLDER
from .card import is_replaceable, made_text, render_card, save_card
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
            overwrite: whether a card that a person wrote or edited may be replaced, and pictures of theirs.

        Raises:
            SettingsError: if there is such a card or picture, or a folder or file in the way.
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
            SettingsError: if there is a card that was written or edited by one, or another picture, and not
                `overwrite`; if a folder or file is in the way.
        """
        if self.path.is_dir():
            raise SettingsError(f"{self.path}: is a folder; give a file with --output, such as {self.path}/README.md.")
        for folder in {target.parent for target in self.pictures}:
            if folder.exists() and not folder.is_dir():
                raise SettingsError(f"{folder}: is a file where the pictures go; move it, or give another --output.")
        if not overwrite and not is_replaceable(self.path):
            raise SettingsError(
                f"{self.path}: was written or edited by hand; give --overwrite to replace it, or another file with "
                "--output."
            )
        if not overwrite:
            self._check_pictures()

    def _check_pictures(self) -> None:
        """Check that no picture is replaced but those that the card that stands, made here too, shows."""
        shown = made_text(self.path) or ""
        for target, source in self.pictures.items():
            is_ours = f"]({FIGURES_FOLDER}/{target.name})" in shown
            if target.exists() and not is_ours and target.read_bytes() != source.read_bytes():
                raise SettingsError(
                    f"{target}: is another picture; give --overwrite to replace it, or another file with --output."
                )


def finish_card(folder: Path, extras: CardExtras, path: Path) -> FinishedCard:
    """Return the card of the checkpoint in `folder` for the file `path`.

    Raises:
        SettingsError: if there is no checkpoint, or the Hub would not take the card.
    """
    text = render_card(read_checkpoint(folder), extras)
    if problems := card_problems(text):
        raise SettingsError(f"the card would not be valid: {' '.join(problems)}{_way_out(problems)}")
    shown = {} if extras.analysis is None else extras.analysis.pictures
    pictures = {path.parent / FIGURES_FOLDER / source.name: source for source in shown}
    return FinishedCard(
        text, path, {target: source for target, source in pictures.items() if target.resolve() != source.resolve()}
    )


def _way_out(problems: Sequence[str]) -> str:
    fields = [problem.partition(":")[0] for problem in problems]
    flags = [f"--{field}" for field in dict.fromkeys(fields) if field in ("license", "language", "datasets")]
    return f" Say what holds with {', '.join(flags)}." if flags else ""
