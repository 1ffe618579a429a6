"""What the parts of a card say, as the template takes it."""

import math
from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from ..common.numbers import format_bytes, format_count, perplexity
from .analysis import FIGURES_FOLDER, Analysis
from .checkpoint import Checkpoint
from .evaluation import Evaluation
from .extras import CardExtras
from .metadata import title
from .papers import citation, paper_url, papers_of
from .state import state
from .steps import described_steps, evaluated_at, joined, listed, num_active_experts
from .terms import first_parents, licence, merged_parents, unknown_languages


def sections(checkpoint: Checkpoint, extras: CardExtras, data: ModelCardData) -> dict[str, Any]:
    """Return the values of the template."""
    return {
        "title": extras.title or title(checkpoint),
        "introduction": _introduction(checkpoint),
        "state": state(checkpoint),
        "packaged_recipe": extras.packaged_recipe,
        "properties": _properties(checkpoint),
        **_use(checkpoint),
        "steps": described_steps(checkpoint) if checkpoint.steps else [],
        "fresh_routers": _fresh_routers(checkpoint),
        "training": _training(checkpoint),
        "evaluations": [_evaluation(evaluation) for evaluation in extras.evaluations],
        "analysis": _analysis(extras.analysis),
        "limits": _limits(checkpoint, data),
        "licence": licence(checkpoint, extras, data),
        "citations": [citation(number) for number in papers_of(checkpoint)],
    }


def _introduction(checkpoint: Checkpoint) -> str:
    """Return what the model is, in a few sentences."""
    merged = merged_parents(checkpoint)
    return _origin(checkpoint) + f"\nIt is a merge of {joined(merged)}." * bool(merged)


def _origin(checkpoint: Checkpoint) -> str:
    lines = [_kind(checkpoint)]
    parents, description = checkpoint.parents, checkpoint.description
    dense_models = "dense model" + "s" * (len(parents) > 1)
    if not parents:
        is_trained_only = first_parents(checkpoint) and not merged_parents(checkpoint)
        trained = f", trained from {joined(first_parents(checkpoint))}" if is_trained_only else ""
        return f"{lines[0].rstrip(',')}{trained}."
    if checkpoint.is_from_scratch:
        lines.append(f"drawn at random in the shape of the dense model {joined(parents)}.")
    else:
        lines.append(f"upcycled from the {dense_models} {joined(parents)}")
        if description.get("papers"):
            method, paper = description["method"], description["papers"][0]
            lines.append(f"with routers by [{method}]({paper_url(paper)}).")
        else:
            lines[-1] += "."
    others = description.get("papers", [])[0 if checkpoint.is_from_scratch else 1 :]
    if others:
        lines[-1] += f" It builds on {', '.join(f'[{number}]({paper_url(number)})' for number in others)}."
    return "\n".join(lines)


def _kind(checkpoint: Checkpoint) -> str:
    kind = "reward" if checkpoint.is_reward_model else "language"
    if checkpoint.num_experts is None:
        if checkpoint.parents:
            return f"A dense {kind} model, made by merging the experts of a Mixture-of-Experts model that was"
        return f"A dense {kind} model"
    num_free = sum(checkpoint.config.get(f"num_{kind}_experts") or 0 for kind in ("zero", "copy", "constant"))
    free = f" and {num_free} without computation" if num_free else ""
    what = "reward model" if checkpoint.is_reward_model else "model"
    return (
        f"A Mixture-of-Experts {what} with {checkpoint.num_experts} experts a layer{free}, "
        f"{num_active_experts(checkpoint)} of them active for each token,"
    )


def _properties(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the rows of the table."""
    rows, weights, config = {}, checkpoint.weights, checkpoint.config
    if weights is not None:
        rows["Parameters"] = format_count(weights.total_parameters)
        if checkpoint.num_experts is not None:
            rows["Parameters"] += f" in all, {format_count(weights.active_parameters)} active for a token"
    if checkpoint.is_as_converted:
        rows |= checkpoint.description["lines"]
        rows["Router"] = checkpoint.description["router"]
    else:
        rows["Architecture"] = checkpoint.architecture
        rows["Layers"] = str(config.get("num_hidden_layers", "–"))
        if checkpoint.num_experts is not None:
            rows["Experts"] = f"{checkpoint.num_experts} a layer, {num_active_experts(checkpoint)} active"
        if config.get("shared_expert_intermediate_size"):
            rows["Shared expert"] = f"one a layer, {config['shared_expert_intermediate_size']} wide"
    if weights is not None:
        rows["Weights"] = f"{', '.join(weights.dtypes)}, {format_bytes(weights.num_bytes)}"
    return rows


def _use(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "auto_class": "AutoModelForCausalLM" if checkpoint.is_causal_lm else "AutoModelForSequenceClassification",
        "is_classifier": not checkpoint.is_causal_lm,
        "is_reward_model": checkpoint.is_reward_model,
        "has_tokenizer": checkpoint.has_tokenizer,
        # What Transformers knows by itself runs no code that comes along.
        "trust": ", trust_remote_code=True" if checkpoint.is_upcycled else "",
        "server": _server(checkpoint),
    }


def _server(checkpoint: Checkpoint) -> str | None:
    """Return the command that serves the folder it is given in; None where it would compute something else."""
    if checkpoint.is_upcycled or not checkpoint.is_causal_lm:
        return None
    exports = [step for step in checkpoint.steps if step["command"] == "export"]
    model_impl = exports[-1].get("vllm_model_impl", "vllm") if exports else "vllm"
    if model_impl is None:
        return None
    return "vllm serve ." if model_impl == "vllm" else f"vllm serve . --model-impl {model_impl}"


def _fresh_routers(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the figures of fresh routers; None where there are none, or others since."""
    layers = checkpoint.provenance.get("routers")
    if not layers or checkpoint.steps or not checkpoint.description:
        return None
    num_experts = len(layers[0]["load"])
    return {
        "num_tokens": f"{checkpoint.description['num_calibrated_tokens']:,}",
        "data": listed(checkpoint.description["calibration_data"]),
        "uniform_entropy": f"{math.log(num_experts):.3f}",
        "balanced_load": f"{1 / num_experts:.3f}",
        "layers": layers,
    }


def _training(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the figures of the last training; None where another step has made them those of another model."""
    if not checkpoint.steps or checkpoint.steps[-1]["command"] != "train":
        return None
    step = checkpoint.steps[-1]
    losses = dict(step.get("evaluation") or {})
    if len(losses) == 2:
        losses.pop("all", None)  # it says the same again
    rows = [
        {"domain": domain, "loss": f"{loss:.4f}", "perplexity": f"{perplexity(loss):,.2f}"}
        for domain, loss in sorted(losses.items(), key=lambda row: row[0] == "all")
    ]
    routers = [
        {
            "layer": layer["layer"],
            "entropy": number(layer.get("entropy"), ".3f"),
            "largest_load": number(layer.get("max_violation"), ".2f", plus=1),
            "dead_experts": number(layer.get("dead_experts"), ".0f"),
        }
        for layer in step.get("routers") or []
    ]
    return {
        "loss": number(step.get("loss"), ".4f") if step.get("loss") is not None else None,
        "settings": {
            name: f"{value:g}" if isinstance(value, float) else str(value)
            for name, value in (step.get("settings") or {}).items()
        },
        "evaluation": rows,
        "preference": _preference(step),
        "evaluated": evaluated_at(step),
        "routers": routers,
    }


def _preference(step: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the rows of an evaluation on preference pairs; that of all pairs comes last."""
    patterns = {"pairs": ",d", "accuracy": ".3f", "length_baseline": ".3f", "margin": ".3f", "loss": ".4f"}
    evaluation = step.get("preference")
    rows = {**evaluation["sources"], "all pairs": evaluation["all"]} if evaluation else {}
    return [
        {"source": source, **{name: number(figures.get(name), pattern) for name, pattern in patterns.items()}}
        for source, figures in rows.items()
    ]


def number(value: float | None, pattern: str, plus: float = 0) -> str:
    """Return `value` and `plus` as a table shows it, a dash for none."""
    return "–" if value is None else format(value + plus, pattern)


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Return a table of scores by task and one of perplexities by domain, a column for each checkpoint."""
    checkpoints = evaluation.checkpoints
    tasks = [
        {
            "name": task["name"],
            "metric": task["metric"],
            "items": f"{task['num_items']:,}",
            "chance": number(task["chance"], ".3f"),
            "scores": [_score(one["tasks"].get(task["name"], {}).get(task["metric"])) for one in checkpoints],
        }
        for task in evaluation.tasks
    ]
    averages = [
        {"name": name, "scores": [_score((one["averages"].get(name) or {}).get("score")) for one in checkpoints]}
        for name in evaluation.own.get("averages", {})
    ]
    domains = [
        {
            "name": domain,
            "perplexities": [
                number((one["domains"].get(domain) or {}).get("perplexity"), ",.2f") for one in checkpoints
            ],
            "bits": [number((one["domains"].get(domain) or {}).get("bits_per_byte"), ".3f") for one in checkpoints],
        }
        for domain in evaluation.own["domains"]
    ]
    names = ["This model", *(one["name"] for one in evaluation.others)]
    return {"names": names, "tasks": tasks, "averages": averages, "domains": domains, "notes": evaluation.notes}


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "–"
    error = "" if score["stderr"] is None else f" ± {score['stderr']:.3f}"
    return f"{score['value']:.3f}{error}"


def _analysis(analysis: Analysis | None) -> dict[str, Any] | None:
    if analysis is None:
        return None
    return {
        "domains": listed(analysis.domains),
        "layers": [_shown_layer(layer) for layer in analysis.layers()],
        "pictures": [
            {"path": f"{FIGURES_FOLDER}/{path.name}", "shows": shows} for path, shows in analysis.pictures.items()
        ],
    }


def _shown_layer(layer: Mapping[str, Any]) -> dict[str, str]:
    patterns = {"layer": "d", "dead_experts": ".0f"}
    return {name: number(value, patterns.get(name, ".3f")) for name, value in layer.items()}


def _limits(checkpoint: Checkpoint, data: ModelCardData) -> list[str]:
    """Return what a reader should know before using the model, in sentences."""
    description, limits = checkpoint.description, []
    has_several_parents = len(checkpoint.parents) > 1
    if checkpoint.parents and not checkpoint.is_from_scratch:
        wrong = "its parents get" if has_several_parents else "its parent gets"
        may = "may get wrong too" if checkpoint.is_trained else "gets wrong"
        limits.append(f"Whatever {wrong} wrong, this model {may}.")
    if description and not checkpoint.steps:
        limits += description["fresh_limits"]
    if checkpoint.is_as_converted:
        limits += description["limits"]
    if checkpoint.num_experts is None and checkpoint.parents:
        limits.append(_limit_of_merge(checkpoint))
    if any(step["command"] == "prune" for step in checkpoint.steps):
        limits.append("Which experts went was decided on a sample of text; other text may have needed them.")
    for step in checkpoint.steps:
        if step["command"] == "export":
            limits += [f"On the export: {note}" for note in step.get("notes") or []]
    if sentence := unknown_languages(checkpoint, data):
        limits.append(sentence)
    if checkpoint.recipe:
        models = "dense models" if has_several_parents else "dense model"
        limits.append(
            f"The recipe, revision and file hashes of the {models}, and the versions of all software are in "
            "`upcycling.json`."
        )
    return limits


def _limit_of_merge(checkpoint: Checkpoint) -> str:
    methods = [step.get("method") for step in checkpoint.steps if step["command"] == "merge"]
    if methods[-1:] == ["shared"]:
        return "Only the shared expert of each layer was kept; what the routed experts had learned was left out."
    return "A merged FFN is an approximation of the experts, unless these were equal."
