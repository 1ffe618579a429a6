"""What came out of a study: everything that its report tells, from the folders of its tasks.

Dimensions: P prompts, N responses to each.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from upcycled_moe.common.provenance import installed_versions

from ..router_upcycling.tasks import Task, busy_seconds
from .files import (
    CURVES_FOLDER,
    GOLD,
    LABELS_FILE,
    MODEL_FOLDER,
    POLICY,
    curves_task,
    labels_task,
    merge_labels_task,
    proxy_task,
)
from .model_stages import LEARNED
from .plan import DENSE, MERGES, MOE
from .settings import StudySettings, World


def collect_results(study: StudySettings, tasks: Sequence[Task], output: Path) -> dict[str, Any]:
    """Return all results of `study` from the folder `output`; they fit in JSON."""
    return {
        "title": study.title,
        "settings": dataclasses.asdict(study),
        "versions": installed_versions(),
        "wall_seconds": busy_seconds(tasks, output),
        "policy": final_evaluation(output / POLICY),
        "gold": final_evaluation(output / GOLD),
        "worlds": {name: _world(study, name, world, output) for name, world in study.worlds.items()},
    }


def _world(study: StudySettings, name: str, world: World, output: Path) -> dict[str, Any]:
    written = (output / curves_task(name) / CURVES_FOLDER / "results.json").read_text(encoding="utf-8")
    # Checkpoints by their place in the study, wherever that lies.
    measured = json.loads(written.replace(f"{output}/", ""))
    return {
        "title": world.title,
        "labels": _label_counts(output / labels_task(name)),
        "merge_labels": _label_counts(output / merge_labels_task(name)),
        "table": table_facts(output / curves_task(name) / CURVES_FOLDER, measured, world.shortcut),
        "fits": {seed: _fit(output / proxy_task(name, LEARNED, seed)) for seed in study.seeds},
        "best_of_n": measured,
    }


def _label_counts(folder: Path) -> dict[str, int]:
    return json.loads((folder / LABELS_FILE).read_text(encoding="utf-8"))


def final_evaluation(folder: Path) -> dict[str, float]:
    """Return the last value of each figure that a run's log has of held-out data."""
    state = json.loads((folder / MODEL_FOLDER / "trainer_state.json").read_text(encoding="utf-8"))
    return {key: value for entry in state["log_history"] for key, value in entry.items() if key.startswith("eval_")}


def _fit(folder: Path) -> dict[str, Any]:
    """Return what learning coefficients did, without its steps."""
    record = json.loads((folder / MODEL_FOLDER / "merge_fit.json").read_text(encoding="utf-8"))
    return {name: value for name, value in record.items() if name not in ("steps", "settings")}


def table_facts(folder: Path, measured: dict[str, Any], shortcut: str | None) -> dict[str, Any]:
    """Return what the fixed table is like: how gold goes with the length of responses, and with the shortcut.

    Correlations are within prompts: gold, and what it is compared with, less their means over the responses to each.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(folder / "scores.parquet").to_pydict()
    gold = np.array(table[measured["gold"]["column"]])  # [P, N]
    features = {"length": np.array([[len(text) for text in row] for row in table["responses"]], dtype=float)}
    if shortcut is not None:
        features["shortcut"] = np.array([[float(shortcut in text) for text in row] for row in table["responses"]])
    return {
        "correlation": {name: _correlation(gold, feature) for name, feature in features.items()},
        "share_with_shortcut": float(features["shortcut"].mean()) if shortcut is not None else None,
        "models": {
            name: {
                feature: float(np.mean([_correlation(scores, values) for scores in _seeds(table, model)]))
                for feature, values in features.items()
            }
            for name, model in measured["models"].items()
            if name in (DENSE, MOE, *MERGES)
        },
    }


def _seeds(table: dict[str, Any], model: dict[str, Any]) -> list[np.ndarray]:
    return [np.array(table[checkpoint["column"]]) for checkpoint in model["checkpoints"]]


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Pearson's correlation of [P, N] with [P, N] within prompts; 0 where one does not vary."""
    first, second = (values - values.mean(axis=1, keepdims=True) for values in (first, second))
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    return float((first * second).sum() / scale) if scale > 0 else 0.0
