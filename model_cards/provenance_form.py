"""What a card needs of `upcycling.json`, which people may have edited and other versions written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.settings import SettingsError
from .forms import NUMBER, NUMBER_OR_NONE, check_form


_SOURCE = {"name": str, "revision?": str}
_DESCRIPTION = {
    "lines": {"Experts": str, ...: str},
    "router": str,
    "method": str,
    "papers": [str],
    "num_active?": str,
    "preserves_function": str,
    "preservation_reason": str,
    "fresh_limits": [str],
    "limits": [str],
    "calibration_data": [str],
    "calibration_datasets?": [str],
    "num_calibrated_tokens": int,
    "terms?": [dict],
}
_FRESH_ROUTER = {"layer": int, "logit_std": NUMBER, "entropy": NUMBER, "load": [NUMBER], "dead_experts": NUMBER}
_PROVENANCE = {
    "source?": _SOURCE,
    "expert_sources?": [_SOURCE],
    "recipe?": {"experts": str, "backbone": str, "num_experts": int, "num_experts_per_tok": int},
    "description?": _DESCRIPTION,
    "routers?": [_FRESH_ROUTER],
    "steps?": [
        {
            "command": str,
            "source?": _SOURCE,
            "other_sources?": [_SOURCE],
            "terms?": dict,
            "source_terms?": [dict],
            "notes?": [str],
        }
    ],
}
_TRAIN = {
    "steps": int,
    "best_of_steps?": int,
    "tokens?": int,
    "data?": [str],
    "datasets?": [str],
    "settings?": dict,
    "loss?": NUMBER,
    "evaluation?": {...: NUMBER},
    "evaluation_step?": int,
    "routers?": [{"layer": int, ...: NUMBER_OR_NONE}],
}


def check_provenance(provenance: Mapping[str, Any], file: Path) -> None:
    """Check what cards take of the `provenance` in `file`; steps of an unknown kind may have any facts.

    Raises:
        SettingsError: if a part has another type, or is missing.
    """
    check_form(provenance, _PROVENANCE, file)
    for step in provenance.get("steps") or []:
        if step["command"] == "train":
            check_form(step, _TRAIN, file)
    num_sources = 1 + len(provenance.get("expert_sources") or [])
    terms = (provenance.get("description") or {}).get("terms")
    if terms is not None and len(terms) != num_sources:
        raise SettingsError(
            f"{file}: description.terms are of {len(terms)} dense models instead of {num_sources}; correct it, or "
            "make the file anew."
        )
