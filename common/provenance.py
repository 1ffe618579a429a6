"""Where results come from: the parent of a converted checkpoint, and the versions of the packages."""

import hashlib
import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import replacing, write_text
from .settings import SettingsError


# What a conversion writes beside the weights, and training carries on.
PROVENANCE_FILE = "upcycling.json"
_WAY_OUT = "fetch it again, or remove it if what is made of the checkpoint need not say where that comes from"
PACKAGES = ("upcycled-moe", "torch", "transformers", "safetensors", "datasets")


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {
        package: importlib.metadata.version(package) for package in PACKAGES
    }


def read_provenance(folder: str | Path) -> dict[str, Any] | None:
    """Return what the provenance file in `folder` says, None if there is none.

    Raises:
        SettingsError: if it is damaged; what it said would be lost with the next step.
    """
    path = Path(folder) / PROVENANCE_FILE
    try:
        provenance = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SettingsError(f"{path}: not valid JSON ({error}); {_WAY_OUT}.") from error
    if (problem := _problem(provenance)) is not None:
        raise SettingsError(f"{path}: {problem}; {_WAY_OUT}.")
    return provenance


def _problem(provenance: Any) -> str | None:
    """Return what is wrong with what others build on in `provenance`, None if nothing is."""
    if not isinstance(provenance, dict):
        return f"holds a {type(provenance).__name__} instead of an object"
    steps = provenance.get("steps", [])
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        return f"steps={steps!r} is no list of objects"
    for name in ("source", "recipe", "description"):
        if not isinstance(provenance.get(name, {}), dict):
            return f"{name}={provenance[name]!r} is no object"
    return None


def recorded_name(name: str, folder: Path) -> str:
    """Return how provenance calls the checkpoint `name` in `folder`: `.` and `..` would be another folder there."""
    return folder.resolve().name if Path(name).name in ("", "..") else name


def with_step(provenance: dict[str, Any] | None, command: str, **facts: Any) -> dict[str, Any]:
    """Return `provenance` with one step more: what `command` did to the checkpoint, with which versions.

    Steps are in their order, below the conversion that began it all. No time and no machine: the same commands give
    the same bytes.
    """
    provenance = dict(provenance or {})
    steps = [*provenance.get("steps", []), {"command": command, **facts, "versions": installed_versions()}]
    return provenance | {"steps": steps}


def write_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Write `provenance` into `folder`, which is being made."""
    write_text(folder / PROVENANCE_FILE, _formatted(provenance))


def replace_provenance(folder: Path, provenance: dict[str, Any]) -> None:
    """Write `provenance` into a `folder` that stands, whole or not at all."""
    with replacing(folder / PROVENANCE_FILE) as partial:
        write_text(partial, _formatted(provenance))


def _formatted(provenance: dict[str, Any]) -> str:
    return json.dumps(provenance, indent=2) + "\n"


@dataclass(frozen=True)
class RecordedParent:
    """The dense checkpoint that another was converted from.

    Args:
        folder: where it was, and where there still is one.
        sha256: name and SHA-256 of each weight file, as it was then.
    """

    folder: str
    sha256: tuple[tuple[str, str], ...]

    def changed_file(self) -> str | None:
        """Return the name of a weight file that is not the same any more, or None; reads them all."""
        for name, digest in self.sha256:
            try:
                with Path(self.folder, name).open("rb") as file:
                    is_same = hashlib.file_digest(file, "sha256").hexdigest() == digest
            except OSError:
                is_same = False
            if not is_same:
                return name
        return None


def recorded_parent(folder: str | Path) -> RecordedParent | None:
    """Return the dense checkpoint that the one in `folder` was converted from, if that folder is here too.

    None as well if it was made of several. Of a checkpoint within a run the run's folder knows.
    """
    folder = Path(folder).resolve()
    for place in (folder, folder.parent):
        try:
            provenance = json.loads((place / PROVENANCE_FILE).read_text(encoding="utf-8"))
            source = provenance["source"]
            parent = RecordedParent(source["name"], tuple(source["sha256"].items()))
            is_here = not provenance["expert_sources"] and Path(parent.folder, "config.json").is_file()
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        return parent if is_here else None
    return None
