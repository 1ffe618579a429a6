"""What lies beside learned weights: the coefficients, the steps that led there, and a picture of them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.files import write_text
from ..common.pictures import INSTALL, can_draw
from ..common.progress import Progress
from ..model_cards.training import shown_source
from .settings import LearnSettings


if TYPE_CHECKING:
    from ..preference.fit_record import FitRecord

# What `--coefficients` takes.
LEARNED_COEFFICIENTS = "merge_coefficients.json"
FIT_FILE = "merge_fit.json"
FIT_PLOT = "merge_fit.png"
# Provenance has the settings in another place, and no steps.
_LONG = ("settings", "initial", "final", "steps")


def write_fit(fit: "FitRecord", folder: Path, progress: Progress) -> None:
    """Write how coefficients were learned into `folder`; without Matplotlib there is no picture, and a warning."""
    write_text(folder / FIT_FILE, json.dumps(fit.to_dict(), indent=2) + "\n")
    if can_draw():
        # Imported here, as one method of many draws.
        from ..preference.fit_plot import plot_fit

        plot_fit(fit, folder / FIT_PLOT)
    else:
        progress.warn(f"No picture of how the coefficients moved: Matplotlib is missing; {INSTALL}.")


def learning_facts(learn: LearnSettings | None, fit: "FitRecord | None") -> dict[str, Any]:
    """Return what provenance keeps of how coefficients were learned; nothing if they were not.

    That is from how much data, how far they moved, and what the loss was before and after.
    """
    facts = {}
    if learn is not None:
        settings = asdict(learn)
        facts["learn"] = settings | {
            "data": settings["data"] | {"data": list(learn.data.data)},
            "shown_data": list(map(shown_source, learn.data.data)),
        }
    if fit is not None:
        facts["fit"] = {name: value for name, value in fit.to_dict().items() if name not in _LONG}
    return facts
