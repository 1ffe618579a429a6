"""Cards of the checkpoints that a run of iterative DPO writes."""

from pathlib import Path

from ...common.progress import Progress
from ...common.text import first_line
from ...model_cards.card import write_card


def write_card_or_warn(folder: Path, source: Path, progress: Progress) -> None:
    """Write the card of the checkpoint in `folder`, which was made of that in `source`; warn if that fails."""
    try:
        write_card(folder, source)
    # Whatever it is: weights are not lost for a card.
    except Exception as error:
        progress.warn(f"{folder.name}: no card is written ({first_line(error)}).")
