"""Which entry of a report on several checkpoints is the one whose card is written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.settings import SettingsError
from .checkpoint import read_checkpoint


def own_entry(entries: Sequence[Mapping[str, Any]], folder: Path, report: Path) -> Mapping[str, Any]:
    """Return the entry on the checkpoint in `folder`: of its path, else of its name, if it was moved since.

    Many folders are called `final` or `checkpoint-100`: by its name only an entry is taken whose own folder is gone,
    and that tells of a model of the same type and size.

    Raises:
        SettingsError: if there is none.
    """
    folder = folder.resolve()
    with_path = [entry for entry in entries if entry.get("path")]
    by_path = [entry for entry in with_path if Path(entry["path"]).resolve() == folder]
    by_name = [entry for entry in with_path if Path(entry["path"]).name == folder.name and _is_gone(entry)]
    facts = _facts(folder) if by_path or by_name else {}
    # A report says little of a model before it is asked for more: by the name alone, the type has to be there.
    by_path = [entry for entry in by_path if _fits(entry, facts)]
    by_name = [entry for entry in by_name if _fits(entry, facts) and "model_type" in entry]
    for found in (by_path, by_name):
        if len(found) == 1:
            return found[0]
    names = ", ".join(f"{entry.get('name')} ({entry.get('path')})" for entry in entries) or "none"
    raise SettingsError(
        f"{report}: tells of {names}, but not of one checkpoint {folder.name} of this type and size; give a report "
        "that was made with this folder."
    )


def _is_gone(entry: Mapping[str, Any]) -> bool:
    return not Path(entry["path"]).exists()


def _facts(folder: Path) -> dict[str, Any]:
    """Return what reports tell of a checkpoint, as it is in `folder`."""
    checkpoint = read_checkpoint(folder)
    weights = checkpoint.weights
    facts = {
        "model_type": checkpoint.config.get("model_type"),
        "num_parameters": None if weights is None else weights.total_parameters,
        "num_experts_per_tok": checkpoint.config.get("num_experts_per_tok"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _fits(entry: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    return all(entry.get(name, value) == value for name, value in facts.items())
