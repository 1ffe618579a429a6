"""Names of tasks and of the files that they write, and lines of JSON."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


TEXT, POLICY, SAMPLES, GOLD_PAIRS = "text", "policy", "samples", "gold_pairs"
GOLD, SCORED_PAIRS, MERGE_PAIRS = "gold", "scored_pairs", "merge_pairs"

POLICY_TEXT_FILE, POLICY_VALIDATION_FILE = "policy_train.jsonl", "policy_validation.jsonl"
HUMAN_FILES = {"train": "human_train.jsonl", "test": "human_test.jsonl"}
PROMPTS_FILES = {"train": "prompts_train.jsonl", "test": "prompts_test.jsonl"}
GOLD_SAMPLES_FILE, TRAINING_SAMPLES_FILE, MERGE_SAMPLES_FILE, TABLE_FILE = (
    "gold_samples.parquet",
    "training_samples.parquet",
    "merge_samples.parquet",
    "table.parquet",
)
# Gold is measured on each by itself: the file's name is that of the source.
GOLD_TRAIN_FILE, PREFERENCES_FILE, ORIGINS_FILE = "gold_train.jsonl", "preferences.jsonl", "origins.jsonl"
PAIRS_FILE, LABELS_FILE = "pairs.jsonl", "labels.json"
MODEL_FOLDER = "model"
CURVES_FOLDER = "curves"


def labels_task(world: str) -> str:
    """Return the name of the task that labels the pairs of `world`."""
    return f"{world}/labels"


def merge_labels_task(world: str) -> str:
    """Return the name of the task that labels the pairs of `world` that merging learns from."""
    return f"{world}/merge_labels"


def proxy_task(world: str, method: str, seed: int) -> str:
    """Return the name of the task that makes one reward model."""
    return f"{world}/{method}/seed_{seed}"


def curves_task(world: str) -> str:
    """Return the name of the task that measures all reward models of `world`."""
    return f"{world}/best_of_n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a JSON lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write `rows` to a JSON lines file."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
