"""What the routers of a model do, from the `report.json` of an analysis: a table and figures for its card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.settings import SettingsError
from .choosing import own_entry
from .evaluation import read_report
from .forms import NUMBER, NUMBER_OR_NONE, check_form


ANALYSIS_FILE = "report.json"
FIGURES_FOLDER = "figures"


@dataclass(frozen=True)
class Picture:
    """A picture of a report.

    Args:
        shows: what it shows, in the words of the report.
        measure, part: the measure that it is drawn of, and its figure or table; of all there are if None.
    """

    shows: str
    measure: str | None = None
    part: str | None = None

    def is_of(self, entry: Mapping[str, Any]) -> bool:
        """Return whether the checkpoint of `entry` is drawn in it."""
        if self.measure is None:
            return True
        measure = entry["measures"].get(self.measure, {})
        values = (measure.get("per_layer") or {}).get(self.part) or (measure.get("tables") or {}).get(self.part) or []
        return any(value is not None for value in values)


# Those that tell most of a model.
PICTURES = {
    "overview.png": Picture("Routing figures by layer"),
    "load.png": Picture("Load: share of all selections, by layer and expert", "routing", "load"),
    "routing_weights.png": Picture(
        "Mean routing weight by domain, by expert of the last MoE layer", "routing_weights", "weights"
    ),
    "expert_output_similarity.png": Picture(
        "Cosine similarity of expert outputs, by layer", "expert_outputs", "expert_output_similarity"
    ),
    "parent_divergence.png": Picture("Divergence from the parent, by layer", "expert_weights", "parent_divergence"),
}
_MEASURE = {"per_layer": {...: [NUMBER_OR_NONE]}}
_ENTRY = {
    "name": str,
    "path?": str,
    "layers": [int],
    "measures": {
        "routing?": {
            "per_layer": {"entropy": [NUMBER_OR_NONE], "dead_experts": [NUMBER_OR_NONE], ...: [NUMBER_OR_NONE]},
            "tables": {"load": [[NUMBER]]},
        },
        "routing_weights?": _MEASURE,
        ...: dict,
    },
}


@dataclass(frozen=True)
class Analysis:
    """What an analysis found for this model.

    Args:
        own: the entry of this model.
        domains: of the text, in order.
        pictures: files to show, with what they show.
    """

    own: Mapping[str, Any]
    domains: Sequence[str]
    pictures: Mapping[Path, str]

    def layers(self) -> list[dict[str, Any]]:
        """Return the figures of each MoE layer; None where there is none."""
        routing = self.own["measures"].get("routing")
        if routing is None:
            return []
        weights = self.own["measures"].get("routing_weights", {"per_layer": {}})["per_layer"]
        figures = routing["per_layer"] | {"routing_diversity": weights.get("routing_diversity")}
        loads = routing["tables"]["load"]
        return [
            {
                "layer": layer,
                **{name: values and values[number] for name, values in figures.items()},
                "least_load": min(loads[number]),
                "most_load": max(loads[number]),
            }
            for number, layer in enumerate(self.own["layers"])
        ]


def read_analysis(path: Path, folder: Path) -> Analysis:
    """Return what the analysis in `path` found for the checkpoint in `folder`.

    Raises:
        SettingsError: if the file is not that of an analysis, or none of its checkpoints is this one.
    """
    content = read_report(path, ("checkpoints", "domains"), ("measures", "layers"), "`upcycled-moe analyze`")
    check_form(content, {"checkpoints": [_ENTRY], "domains": [str]}, path)
    entries = content["checkpoints"]
    own = own_entry(entries, folder, path)
    _check_lengths(own, path)
    pictures = {
        path.with_name(name): _caption(picture, own, entries)
        for name, picture in PICTURES.items()
        if picture.is_of(own) and path.with_name(name).is_file()
    }
    return Analysis(own, content["domains"], pictures)


def _caption(picture: Picture, own: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """Return what a picture shows, and of which checkpoints if there are several in the report."""
    if len(entries) == 1:
        return picture.shows
    drawn = [f"{one['name']}{' (this model)' * (one is own)}" for one in entries if picture.is_of(one)]
    return f"{picture.shows}: {', '.join(drawn)}"


def _check_lengths(own: Mapping[str, Any], path: Path) -> None:
    """Check that `own` has figures for each of its layers."""
    measures = [own["measures"][name] for name in ("routing", "routing_weights") if own["measures"].get(name)]
    columns = [values for measure in measures for values in measure["per_layer"].values()]
    columns += [measure["tables"]["load"] for measure in measures[:1] if "load" in measure.get("tables", {})]
    if any(len(values) != len(own["layers"]) for values in columns):
        raise SettingsError(f"{path}: {own['name']} has not as many figures as layers; make the report anew.")
