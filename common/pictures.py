"""Pictures with Matplotlib, an extra: what all of ours share."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .files import replacing


if TYPE_CHECKING:
    from matplotlib.figure import Figure

INSTALL = "pip install 'upcycled-moe[plots]'"


def can_draw() -> bool:
    """Return whether Matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def save_png(figure: "Figure", path: Path) -> None:
    """Write `figure` to `path` at once.

    Raises:
        OSError: if it cannot be written.
    """
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def pixels(figure: "Figure") -> np.ndarray:
    """Return `figure` as red, green and blue [height, width, 3], as it was saved last."""
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def new_figure(height: float, width: float = 9.0) -> "Figure":
    """Return an empty figure of this size in inches, to be saved and not shown."""
    # Without pyplot, which keeps figures and chooses a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
