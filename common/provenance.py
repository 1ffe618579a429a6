"""Where results come from: the parent of a converted checkpoint, and the versions of the packages."""

import importlib.metadata
import json
import platform
from pathlib import Path


# What a conversion writes beside the weights, and training carries on.
PROVENANCE_FILE = "upcycling.json"
PACKAGES = ("upcycled-moe", "torch", "transformers", "safetensors", "datasets")


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in PACKAGES
    }


def recorded_parent(folder: str | Path) -> str | None:
    """Return the dense checkpoint that the one in `folder` was converted from, if that folder is here too.

    None as well if it was made of several. Of a checkpoint within a run the run's folder knows.
    """
    folder = Path(folder).resolve()
    for place in (folder, folder.parent):
        try:
            provenance = json.loads((place / PROVENANCE_FILE).read_text(encoding="utf-8"))
            parent = provenance["source"]["name"]
            is_only_one = not provenance["expert_sources"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return parent if is_only_one and (Path(parent) / "config.json").is_file() else None
    return None
