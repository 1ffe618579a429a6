"""The metadata of a card: what the Hub finds a model by, and takes its results from."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from .checkpoint import Checkpoint, parent_of
from .evaluation import evaluation_results
from .extras import CardExtras
from .names import is_hub_dataset
from .papers import papers_of


TERMS = ("license", "license_name", "license_link", "language")


def model_card_data(checkpoint: Checkpoint, extras: CardExtras) -> ModelCardData:
    """Return the metadata of the card of `checkpoint`."""
    results = evaluation_results(extras.evaluations)
    return ModelCardData(
        **_lineage(checkpoint),
        **_terms(checkpoint, extras),
        library_name="transformers",
        pipeline_tag="text-generation" if checkpoint.is_causal_lm else "text-classification",
        datasets=list(extras.datasets) or _datasets(checkpoint) or None,
        tags=_tags(checkpoint) or None,
        **({"model_name": extras.title or title(checkpoint), "eval_results": results} if results else {}),
    )


def title(checkpoint: Checkpoint) -> str:
    """Return what a card calls a model that nobody has named: after the dense model that it began with."""
    if not checkpoint.parents:
        return checkpoint.name
    parent = checkpoint.parents[0].name.split("/")[-1]
    if checkpoint.num_experts is None:
        return f"{parent}-merged"
    return f"{parent}-{checkpoint.num_experts}x-MoE"


def read_terms(folder: Path) -> dict[str, Any]:
    """Return what the card in `folder` declares of licence and language; nothing if there is none to be read."""
    card = folder / "README.md"
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data if card.is_file() else ModelCardData()
    except (ValueError, YAMLError):
        return {}
    return {name: data.get(name) for name in TERMS if data.get(name) is not None}


def _lineage(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the models on the Hub that this one has something of: the nearest before it, or its dense parents."""
    nearest = [parent_of(step["source"]) for step in reversed(checkpoint.steps) if step.get("source")]
    dense = [] if checkpoint.is_from_scratch else checkpoint.parents
    names = [parent.name for parent in nearest if parent.is_hub_id][:1]
    names = names or [parent.name for parent in dense if parent.is_hub_id]
    if not names:
        return {}
    # Of the relations that the Hub knows, none is that of a model that was only converted.
    relation = "merge" if len(names) > 1 else "finetune" if checkpoint.is_trained else None
    lineage: dict[str, Any] = {"base_model": names[0] if len(names) == 1 else names}
    return lineage | ({"base_model_relation": relation} if relation else {})


def _terms(checkpoint: Checkpoint, extras: CardExtras) -> dict[str, Any]:
    given = {name: getattr(extras, name) for name in TERMS if getattr(extras, name)}
    if "language" in given:
        given["language"] = list(given["language"])
    inherited = {} if checkpoint.is_from_scratch else inherited_terms(checkpoint)
    if "license" in given:
        # Name and link belong to the licence that they were declared with.
        inherited = {name: value for name, value in inherited.items() if not name.startswith("license")}
    return inherited | given


def inherited_terms(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the parents' cards agree on: a licence that only some of them have is not the result's."""
    if not checkpoint.parents:
        return {}
    first, *others = (parent.terms for parent in checkpoint.parents)
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}


def _datasets(checkpoint: Checkpoint) -> list[str]:
    """Return the datasets on the Hub that the model was made with."""
    names = [*checkpoint.description.get("calibration_data", ())]
    for step in checkpoint.steps:
        names += (step.get("data") or ()) if step["command"] == "train" else ()
    # Both record local texts by their last name alone.
    return list(dict.fromkeys(name.partition(":")[0] for name in names if is_hub_dataset(name)))


def _tags(checkpoint: Checkpoint) -> list[str]:
    tags = []
    if checkpoint.num_experts is not None:
        tags += ["moe", "mixture-of-experts"]
    if checkpoint.is_upcycled:
        tags.append("custom_code")
    if checkpoint.parents and not checkpoint.is_from_scratch:
        tags.append("upcycling")
    return [*tags, *(f"arxiv:{number}" for number in papers_of(checkpoint))]
