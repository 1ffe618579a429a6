"""What a card says of a training: facts that the run records, and how they read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.hub_names import hub_datasets, is_hub_dataset
from ..common.settings import load_yaml


STATE_FILE = "trainer_state.json"
SETTINGS_FILE = "training_config.yaml"
# What an evaluation on preference pairs gives, of all pairs and of each source.
PREFERENCE_FIGURES = ("accuracy", "margin", "loss", "length_baseline", "pairs")
_SOURCE = "eval_source/"
# Figures of the routers, by the part of a log's name that stands for them.
ROUTER_FIGURES = ("entropy", "max_violation", "dead_experts")


def training_facts(
    state: Mapping[str, Any],
    settings_file: Path | None,
    source: Mapping[str, Any] | None = None,
    tokens_per_step: int | None = None,
    *,
    is_running: bool = False,
    best_step: int | None = None,
) -> dict[str, Any]:
    """Return what later readers of a checkpoint want to know of its training, for the provenance.

    Args:
        state: of the Trainer, with `global_step` and `log_history`.
        settings_file: those of the run; None where there are none.
        source: name and revision of the checkpoint that it began with; None where that is not known for sure.
        tokens_per_step: None where the run did not tell.
        is_running: whether the run is on, so that local text can be told from datasets on the Hub; else none is taken
            for one of these.
        best_step: the step that the weights are of, where the best ones were loaded at the end.
    """
    settings = {} if settings_file is None else load_yaml(settings_file)
    step = best_step or state["global_step"]
    history = [log for log in state["log_history"] if log.get("step", 0) <= step]
    data = settings.get("train_data") or []
    evaluation, evaluation_step = _last_evaluation(history)
    return {
        "source": None if source is None else dict(source),
        "steps": step,
        **({} if best_step is None else {"best_of_steps": state["global_step"]}),
        "tokens": None if tokens_per_step is None else step * tokens_per_step,
        "data": [shown_source(name) if is_running else last_name(name) for name in data],
        "datasets": hub_datasets(data) if is_running else [],
        "settings": {
            name: settings[name]
            for name in ("block_size", "learning_rate", "lr_scheduler_type", "router_aux_loss_coef")
            if settings.get(name) is not None
        },
        "loss": _last(history, "lm_loss") or _last(history, "loss"),
        "evaluation": evaluation,
        "evaluation_step": evaluation_step,
        "routers": _last_routers(history),
    }


def preference_facts(
    history: Sequence[Mapping[str, Any]], step: int, epochs: float, pairs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what to tell of a training on preference pairs beside, and instead of, that of one on text.

    Args:
        epochs: passes over the pairs up to `step`.
        pairs: their number as `pairs`, `flip_rate`, and whatever else is to be recorded of them.
    """
    evaluated = [log for log in history if "eval_accuracy" in log and log.get("step", 0) <= step]
    last = evaluated[-1] if evaluated else {}
    return {
        "objective": "bradley_terry",
        **pairs,
        "epochs": epochs,
        "loss": _last(history, "preference_loss") or _last(history, "loss"),
        "evaluation": {},
        "evaluation_step": last.get("step"),
        "preference": preference_figures(last),
    }


def preference_figures(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of an evaluation on preference pairs: of `all` pairs, and of each of `sources` by name.

    Both are there only if `metrics` has an evaluation.
    """
    if "eval_accuracy" not in metrics:
        return {}
    ending = "_accuracy"
    sources = [
        name[len(_SOURCE) : -len(ending)] for name in metrics if name.startswith(_SOURCE) and name.endswith(ending)
    ]
    return {
        "all": {figure: metrics[f"eval_{figure}"] for figure in PREFERENCE_FIGURES},
        "sources": {
            source: {figure: metrics[f"{_SOURCE}{source}_{figure}"] for figure in PREFERENCE_FIGURES}
            for source in sources
        },
    }


def shown_source(name: str) -> str:
    """Return how a card calls a source of text that is read now: a dataset of the Hub by its id, else `last_name`."""
    return name if is_hub_dataset(name) else last_name(name)


def last_name(name: str) -> str:
    """Return how a card calls a local source of text: by its last name, without the folders of a machine."""
    return Path(name).name or Path(name).resolve().name


def _last(history: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((log[name] for log in reversed(history) if log.get(name) is not None), None)


def _last_evaluation(history: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], int | None]:
    """Return the last validation loss by domain, the one over all as `all`, and the step that it is of."""
    losses: dict[str, float] = {}
    last_step = max((log["step"] for log in history if any(map(_evaluated_domain, log))), default=None)
    for log in history:
        if log.get("step") == last_step:
            losses |= {domain: log[name] for name in log if (domain := _evaluated_domain(name)) is not None}
    return losses, last_step


def _evaluated_domain(name: str) -> str | None:
    if not (name.startswith("eval_") and name.endswith("loss")):
        return None
    return name.removeprefix("eval_").removesuffix("loss").rstrip("_") or "all"


def _last_routers(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures of each layer's router at the last log."""
    prefix = "router/layer_"
    log = next((log for log in reversed(history) if any(name.startswith(prefix) for name in log)), {})
    layers = sorted({name.removeprefix(prefix).partition("/")[0] for name in log if name.startswith(prefix)}, key=int)
    return [
        {
            "layer": int(layer),
            **{name: log.get(f"{prefix}{layer}/{name}") for name in ROUTER_FIGURES},
        }
        for layer in layers
    ]
