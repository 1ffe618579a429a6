"""Which entry of a report on several checkpoints is the one whose card is written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.settings import SettingsError


def own_entry(entries: Sequence[Mapping[str, Any]], folder: Path, report: Path) -> Mapping[str, Any]:
    """Return the entry on the checkpoint in `folder`: of its path, else the only one of its name.

    Raises:
        SettingsError: if there is none.
    """
    folder = folder.resolve()
    by_path = [entry for entry in entries if entry.get("path") and Path(entry["path"]).resolve() == folder]
    # A folder that has been moved since keeps its name.
    by_name = [entry for entry in entries if Path(str(entry.get("path"))).name == folder.name]
    for found in (by_path, by_name):
        if len(found) == 1:
            return found[0]
    names = ", ".join(str(entry.get("name")) for entry in entries) or "none"
    raise SettingsError(
        f"{report}: tells of {names}, but not of one checkpoint {folder.name}; give a report that was made with this "
        "folder."
    )
