"""What a killed command leaves of its output."""

from pathlib import Path

from upcycled_moe.common.output_folder import LOCK_FILE


def leave_partial(folder: Path) -> Path:
    """Make what a killed run to `folder / "out"` leaves, and return it."""
    partial = folder / "out.partial"
    (partial / "out").mkdir(parents=True)
    (partial / LOCK_FILE).touch()
    (partial / "out" / "half").touch()
    return partial
