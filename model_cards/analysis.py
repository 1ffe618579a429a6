"""What the routers of a model do, from the `report.json` of an analysis: a table and figures for its card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .choosing import own_entry
from .evaluation import read_report


ANALYSIS_FILE = "report.json"
FIGURES_FOLDER = "figures"
# The pictures of a report that tell most of one model, with what they show.
PICTURES = {
    "overview.png": "Routing figures by layer",
    "load.png": "Share of the tokens of each domain that each expert gets, last MoE layer",
    "routing_weights.png": "Mean weight of each expert by domain, last MoE layer",
    "expert_output_similarity.png": "Similarity of the experts' outputs by layer",
    "parent_divergence.png": "Distance of the experts from the dense FFN by layer",
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
    own = own_entry(content["checkpoints"], folder, path)
    pictures = {path.with_name(name): shows for name, shows in PICTURES.items() if path.with_name(name).is_file()}
    return Analysis(own, content["domains"], pictures)
