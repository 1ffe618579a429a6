"""The provenance and the card of what a run saves."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ...common.provenance import read_provenance, recorded_name, replace_provenance, with_step
from ...model_cards.card import update_card
from ...model_cards.terms import read_terms
from ...model_cards.training import training_facts
from ..arguments import Arguments
from ..data.blocks import blocks_per_step
from ..messages import warn
from ..model import CARRIED_FILES
from .checkpoints import CONFIG_FILE


def card_callback(arguments: Arguments, start: Path) -> "CardCallback":
    """Return the callback for a run that begins with the checkpoint in the folder `start`."""
    model, args = arguments.model, arguments.training
    is_local = Path(model.model_name_or_path).is_dir()
    # A revision says that the name is one on the Hub.
    revision = None if is_local else model.model_revision or "main"
    name = recorded_name(model.model_name_or_path, start) if is_local else model.model_name_or_path
    return CardCallback(
        args.output_dir, {"name": name, "revision": revision}, start, blocks_per_step(args) * arguments.data.block_size
    )


class CardCallback(TrainerCallback):
    """Writes into each checkpoint, and to the final model, where it comes from, and a card that tells it.

    A card that cannot be written is a warning: the model is worth more.

    Args:
        output_dir: of the run.
        source: name and revision of the model to start from.
        start: folder of that model, with its provenance and card if it has them.
        tokens_per_step: of all processes together; None where steps are not counted in tokens.
    """

    def __init__(self, output_dir: str, source: Mapping[str, Any], start: Path, tokens_per_step: int | None):
        self.output_dir = Path(output_dir)
        self.source = dict(source)
        self.tokens_per_step = tokens_per_step
        # Now: the run may write into that folder.
        self.origin = read_provenance(start)
        self.terms = read_terms(start)

    def on_checkpoint(self, args, state, folder: Path) -> None:
        """Write both into the checkpoint that is being made in `folder`, and the licence."""
        for pattern in CARRIED_FILES:
            for file in self.output_dir.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        self._write(state, folder)

    def on_model(self, args, state, folder: Path) -> None:
        """Write both beside the whole model in `folder`, which may be that of the best step."""
        is_best = getattr(args, "load_best_model_at_end", False) and state.best_global_step
        self._write(state, folder, best_step=state.best_global_step if is_best else None)

    def _write(self, state, folder: Path, best_step: int | None = None) -> None:
        try:
            facts = self._facts(state, best_step)
            replace_provenance(folder, with_step(self.origin, "train", **facts, terms=self.terms))
            update_card(folder)
        # Whatever it is: hours of training are not lost for a card.
        except Exception as error:
            reason = " ".join(str(error).split())
            warn(f"{folder.name}: no card is written ({reason}).")

    def _facts(self, state, best_step: int | None) -> dict[str, Any]:
        """Return what the provenance says of the training so far."""
        settings_file = self.output_dir / CONFIG_FILE
        return training_facts(
            {"global_step": state.global_step, "log_history": state.log_history},
            settings_file if settings_file.is_file() else None,
            self.source,
            self.tokens_per_step,
            is_running=True,
            best_step=best_step,
        )
