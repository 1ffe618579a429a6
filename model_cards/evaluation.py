"""The scores of a model, from the `results.json` of an evaluation: tables for its card, results for the Hub."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..common.settings import SettingsError
from .choosing import own_entry
from .forms import NUMBER, NUMBER_OR_NONE, check_form


EVALUATION_FILE = "results.json"
# The sets on the Hub that the tasks of the Router Upcycling paper ask from, with their configurations.
TASK_DATASETS: dict[str, tuple[str, str | None]] = {
    "openbookqa": ("allenai/openbookqa", "main"),
    "openbookqa_fact": ("allenai/openbookqa", "additional"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "hellaswag": ("Rowan/hellaswag", None),
    "winogrande": ("allenai/winogrande", "winogrande_xl"),
    "boolq": ("aps/super_glue", "boolq"),
    "copa": ("aps/super_glue", "copa"),
    "nq_open": ("google-research-datasets/nq_open", None),
    "triviaqa": ("mandarjoshi/trivia_qa", "rc.nocontext"),
}

_SCORE = {"value": NUMBER, "stderr": NUMBER_OR_NONE}
_ENTRY = {
    "name": str,
    "path?": str,
    "tasks": {...: {...: _SCORE}},
    "averages": {...: {"score": _SCORE}},
    "domains": {...: {"perplexity?": NUMBER, "bits_per_byte?": NUMBER, "num_tokens": int}},
}
_TASK = {"name": str, "metric": str, "num_items": int, "num_available": int, "chance?": NUMBER, "offline": bool}
_SETTINGS = {"perplexity_data?": [str], "perplexity_datasets?": [str], "split?": str}
_FORM = {"checkpoints": [_ENTRY], "tasks": [_TASK], "settings": _SETTINGS, "notes?": [str]}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found for this model, and for those beside it.

    Args:
        own: the entry of this model; those of `others` follow in the tables.
        tasks: in the order of the tables.
        notes: sentences for the reader.
    """

    own: Mapping[str, Any]
    others: Sequence[Mapping[str, Any]]
    tasks: Sequence[Mapping[str, Any]]
    notes: Sequence[str]
    settings: Mapping[str, Any]

    @property
    def checkpoints(self) -> list[Mapping[str, Any]]:
        """The entries in the order of the columns."""
        return [self.own, *self.others]


def read_evaluation(path: Path, folder: Path) -> Evaluation:
    """Return what the evaluation in `path` found for the checkpoint in `folder`.

    Raises:
        SettingsError: if the file is not that of an evaluation, or none of its checkpoints is this one.
    """
    writer = "`upcycled-moe evaluate`"
    content = read_report(path, ("checkpoints", "tasks", "settings"), ("tasks", "averages", "domains"), writer)
    check_form(content, _FORM, path)
    own = own_entry(content["checkpoints"], folder, path)
    others = [entry for entry in content["checkpoints"] if entry is not own]
    return Evaluation(own, others, content["tasks"], content.get("notes") or [], content["settings"])


def read_report(path: Path, keys: Sequence[str], entry_keys: Sequence[str], writer: str) -> dict[str, Any]:
    """Return the JSON object in `path`, with all `keys`, each of its checkpoints with all `entry_keys`.

    Args:
        writer: what writes such a file, for the error.

    Raises:
        SettingsError: if it is not such a file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise SettingsError(f"{path}: not a JSON file ({error}).") from error
    _check_keys(path, content, keys, writer)
    check_form(content, {"checkpoints": [dict]}, path)
    for entry in content["checkpoints"]:
        _check_keys(path, entry, entry_keys, writer)
    return content


def _check_keys(path: Path, content: Any, keys: Sequence[str], writer: str) -> None:
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise SettingsError(f"{path}: has no {', '.join(missing)}; give a file that {writer} wrote.")


def evaluation_results(evaluations: Sequence[Evaluation]) -> list[EvalResult]:
    """Return the results of this model for the Hub's `model-index`."""
    return [
        result
        for evaluation in evaluations
        for result in (*_task_results(evaluation), *_perplexity_results(evaluation))
    ]


def _task_results(evaluation: Evaluation) -> list[EvalResult]:
    results = []
    for task in evaluation.tasks:
        score = evaluation.own["tasks"].get(task["name"], {}).get(task["metric"])
        if score is None:
            continue
        dataset, config = TASK_DATASETS.get(task["name"], (task["name"], None))
        about = {
            "task_type": "text-generation",
            "dataset_type": dataset,
            "dataset_config": config,
            "dataset_name": dataset_name(task),
            "dataset_args": {"num_items": task["num_items"], "num_available": task["num_available"]},
        }
        results.append(
            EvalResult(
                **about, metric_type=task["metric"], metric_name=task["metric"], metric_value=_rounded(score["value"])
            )
        )
        if score["stderr"] is not None:
            name = f"{task['metric']}_stderr"
            results.append(
                EvalResult(**about, metric_type=name, metric_name=name, metric_value=_rounded(score["stderr"]))
            )
    return results


def dataset_name(task: Mapping[str, Any]) -> str:
    """Return how a result calls the data of a task, so that a part of it does not pass for the whole."""
    if task["num_items"] < task["num_available"]:
        return f"{task['name']} (first {task['num_items']:,} of {task['num_available']:,} items)"
    return f"{task['name']} (local sample)" if task["offline"] else task["name"]


def _perplexity_results(evaluation: Evaluation) -> list[EvalResult]:
    sources = evaluation.settings.get("perplexity_data") or []
    # What was not recorded as one of the Hub may be a folder of this machine.
    hub_ids = evaluation.settings.get("perplexity_datasets") or []
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=hub_ids[0] if len(sources) == len(hub_ids) == 1 else "text",
            dataset_name=domain,
            # By which the Hub tells the domains apart.
            dataset_config=domain,
            dataset_split=evaluation.settings.get("split"),
            metric_type=metric,
            metric_name=metric,
            metric_value=_rounded(loss[metric]),
            dataset_args={"num_tokens": loss["num_tokens"]},
        )
        for domain, loss in evaluation.own["domains"].items()
        for metric in ("perplexity", "bits_per_byte")
        if loss.get(metric) is not None
    ]


def _rounded(value: float) -> float:
    """Return `value` at 6 significant digits, more than any score has."""
    return float(f"{value:.6g}")
