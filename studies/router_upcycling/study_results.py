"""What a study found: the runs as they were, and what follows from them over seeds.

Losses are those of language modeling, in nats per token of validation text.
"""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import stages
from intervals import holm, mean_interval, p_value, paired_difference
from plan import analysis_task, training_task
from study_settings import ALL_DOMAINS, Method, StudySettings
from tasks import TASK_FILE, Task, TaskError, busy_seconds


RESULTS_FORMAT = 2
PACKAGES = ("upcycled-moe", "torch", "transformers")


def collect_results(study: StudySettings, tasks: Sequence[Task], output: Path) -> dict[str, Any]:
    """Return all results of `study`, whose `tasks` are done, for JSON.

    Raises:
        TaskError: if runs that are compared did not see the same blocks.
    """
    parents = {parent: _parent_results(study, parent, output) for parent in study.parents}
    _correct_p_values([pair for found in parents.values() for pair in found["primary_comparisons"]])
    return {
        "format": RESULTS_FORMAT,
        "settings": asdict(study),
        "wall_seconds": busy_seconds(tasks, output),
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {package: version(package) for package in PACKAGES},
        "parents": parents,
    }


def _correct_p_values(pairs: Sequence[dict[str, Any]]) -> None:
    """Add to `pairs`, the primary comparisons with all parents, their p-values corrected for how many there are."""
    if pairs and all(pair["p_value"] is not None for pair in pairs):
        for pair, corrected in zip(pairs, holm([pair["p_value"] for pair in pairs]), strict=True):
            pair["corrected_p_value"] = corrected


def _parent_results(study: StudySettings, parent: str, output: Path) -> dict[str, Any]:
    folder = output / stages.parent_task(parent)
    metrics = _read(folder / stages.METRICS_FILE)
    methods = {
        name: _method_runs(study, parent, name, method, output) for name, method in study.methods_of(parent).items()
    }
    _check_equal_blocks(parent, methods)
    baseline = methods[study.baseline]["runs"]
    for method in methods.values():
        method["loss"] = _intervals(method["runs"])
        method["difference"] = _differences(method["runs"], baseline)
        method["figures"] = _figure_intervals([run.pop("figures") for run in method["runs"].values()])
    return {
        "tokens": _num_tokens(metrics),
        "loss": curve_of(metrics, study.text.domains)[-1]["loss"],
        "cpu_seconds": _cpu_seconds(folder),
        "methods": methods,
        "primary_comparisons": _comparisons(study.primary_comparisons, methods),
        "comparisons": _comparisons(study.comparisons, methods),
    }


def _check_equal_blocks(parent: str, methods: Mapping[str, Any]) -> None:
    """Check that all methods saw the same blocks with the same seed, and were evaluated at the same tokens."""
    first, *others = methods
    for other in others:
        for seed, run in methods[other]["runs"].items():
            expected = methods[first]["runs"][seed]
            if run["blocks_digest"] != expected["blocks_digest"] or _grid(run) != _grid(expected):
                raise TaskError(
                    f"parent {parent!r}, seed {seed}: {first!r} and {other!r} were not trained and evaluated on the "
                    "same blocks, so that they cannot be compared; give another --output."
                )


def _grid(run: Mapping[str, Any]) -> list[int]:
    return [point["tokens"] for point in run["curve"]]


def _comparisons(pairs: Sequence[Sequence[str]], methods: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the differences between the two of each pair that were both tried."""
    return [
        {
            "first": first,
            "second": second,
            "difference": _differences(methods[first]["runs"], methods[second]["runs"]),
            "p_value": p_value(
                [
                    run["loss"][ALL_DOMAINS] - methods[second]["runs"][seed]["loss"][ALL_DOMAINS]
                    for seed, run in methods[first]["runs"].items()
                ]
            ),
        }
        for first, second in pairs
        if first in methods and second in methods
    ]


def _method_runs(study: StudySettings, parent: str, name: str, method: Method, output: Path) -> dict[str, Any]:
    """Return the runs of a method by seed, and what is the same for all of them."""
    runs = {}
    for seed in study.seeds:
        folder = output / training_task(parent, name, seed)
        metrics = _read(folder / stages.METRICS_FILE)
        curve = curve_of(metrics, study.text.domains)
        runs[seed] = {
            "loss": curve[-1]["loss"],
            "curve": curve,
            "figures": {},
            "cpu_seconds": _cpu_seconds(folder),
            "blocks_digest": metrics["blocks_digest"],
        }
        if method.recipe is not None:
            figures = _read(output / analysis_task(parent, name, seed) / stages.ANALYSIS_FILE)
            runs[seed]["figures"] = {
                f"{measure}.{figure}": _mean(values)
                for measure, per_layer in figures.items()
                for figure, values in per_layer.items()
            }
            runs[seed]["initial_logit_std"] = _initial_logit_std(metrics["upcycling"])
    return {
        "title": method.title,
        "tokens": _num_tokens(metrics),
        "flops_per_token": metrics["flops_per_token"],
        "total_parameters": metrics["num_parameters"],
        "active_parameters": metrics["num_parameters"] - _idle_parameters(metrics["upcycling"]),
        "runs": runs,
    }


def curve_of(metrics: Mapping[str, Any], domains: Iterable[str]) -> list[dict[str, Any]]:
    """Return the evaluations of a run: tokens seen, and the loss of each domain and of all."""
    names = {**{f"eval_{domain}_loss": domain for domain in domains}, "eval_loss": ALL_DOMAINS}
    by_step: dict[int, dict[str, float]] = {}
    for entry in metrics["log"]:
        for key in names.keys() & entry.keys():
            by_step.setdefault(entry["step"], {})[names[key]] = entry[key]
    return [{"tokens": step * metrics["tokens_per_step"], "loss": by_step[step]} for step in sorted(by_step)]


def _differences(runs: Mapping[int, Any], others: Mapping[int, Any]) -> dict[str, Any]:
    """Return the final losses of `runs` less those of `others`, paired by seed, with their intervals."""
    return {
        domain: asdict(paired_difference(_losses(runs, domain), _losses(others, domain))) for domain in _domains(runs)
    }


def _intervals(runs: Mapping[int, Any]) -> dict[str, Any]:
    """Return the final loss of each domain and of all, with its interval over seeds."""
    return {domain: asdict(mean_interval(list(_losses(runs, domain).values()))) for domain in _domains(runs)}


def _domains(runs: Mapping[int, Any]) -> Iterable[str]:
    return next(iter(runs.values()))["loss"]


def _losses(runs: Mapping[int, Any], domain: str) -> dict[int, float]:
    return {seed: run["loss"][domain] for seed, run in runs.items()}


def _figure_intervals(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Return mean and interval over seeds of each figure that all runs have."""
    values = {name: [figures.get(name) for figures in runs] for name in runs[0]}
    return {name: asdict(mean_interval(found)) for name, found in values.items() if None not in found}


def _initial_logit_std(upcycling: Mapping[str, Any]) -> float | None:
    """Return the standard deviation of the fresh routers' logits, a mean over layers, where it was measured."""
    reports = upcycling["routers"]
    return None if reports is None else _mean([report["logit_std"] for report in reports])


def _idle_parameters(upcycling: Mapping[str, Any] | None) -> int:
    """Return how many parameters a token does not meet: those of experts that it does not select."""
    return 0 if upcycling is None else upcycling["total_parameters"] - upcycling["active_parameters"]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _num_tokens(metrics: Mapping[str, Any]) -> int:
    return curve_of(metrics, ())[-1]["tokens"]


def _cpu_seconds(folder: Path) -> float:
    return _read(folder / TASK_FILE)["cpu_seconds"]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
