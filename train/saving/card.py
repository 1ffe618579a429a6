"""The provenance and the card of what a run saves."""

import shutil
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ...common.provenance import read_provenance, replace_provenance, with_step
from ...model_cards.card import update_card
from ...model_cards.training import training_facts
from ..arguments import Arguments
from ..data.blocks import blocks_per_step
from ..model import CARRIED_FILES
from .checkpoints import CONFIG_FILE


def card_callback(arguments: Arguments) -> "CardCallback":
    """Return the callback for a run; its output folder has the provenance of the model to start from already."""
    model, args = arguments.model, arguments.training
    is_local = Path(model.model_name_or_path).is_dir()
    # A revision says that the name is one on the Hub.
    revision = None if is_local else model.model_revision or "main"
    return CardCallback(
        args.output_dir,
        {"name": model.model_name_or_path, "revision": revision},
        blocks_per_step(args) * arguments.data.block_size,
    )


class CardCallback(TrainerCallback):
    """Writes into each checkpoint, and to the final model, where it comes from, and a card that tells it.

    A card that cannot be written is a warning: the model is worth more.

    Args:
        output_dir: of the run; it has the provenance of the model to start from, if that has one.
        source: name and revision of that model.
        tokens_per_step: of all processes together.
    """

    def __init__(self, output_dir: str, source: dict[str, Any], tokens_per_step: int):
        self.output_dir = Path(output_dir)
        self.source = source
        self.tokens_per_step = tokens_per_step
        self.origin = read_provenance(output_dir)

    def on_checkpoint(self, args, state, folder: Path) -> None:
        """Write both into the checkpoint that is being made in `folder`, and the licence."""
        for pattern in CARRIED_FILES:
            for file in self.output_dir.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        self.on_model(args, state, folder)

    def on_model(self, args, state, folder: Path) -> None:
        """Write both beside the whole model in `folder`."""
        try:
            settings_file = self.output_dir / CONFIG_FILE
            facts = training_facts(
                {"global_step": state.global_step, "log_history": state.log_history},
                settings_file if settings_file.is_file() else None,
                self.source,
                self.tokens_per_step,
            )
            # Without one, the model was not converted, and the file would say that it was.
            if self.origin is not None:
                replace_provenance(folder, with_step(self.origin, "train", **facts))
            update_card(folder)
        # Whatever it is: hours of training are not lost for a card.
        except Exception as error:
            reason = " ".join(str(error).split())
            print(f"train.py: warning: {folder.name}: no card is written ({reason}).", file=sys.stderr)
