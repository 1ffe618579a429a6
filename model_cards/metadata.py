"""The metadata of a card: what the Hub finds a model by, and takes its results from."""

from typing import Any

from huggingface_hub import ModelCardData

from .checkpoint import Checkpoint, parent_of
from .evaluation import evaluation_results
from .extras import CardExtras
from .papers import papers_of
from .terms import base_models, first_parents, terms_for_metadata


def model_card_data(checkpoint: Checkpoint, extras: CardExtras) -> ModelCardData:
    """Return the metadata of the card of `checkpoint`."""
    results = evaluation_results(extras.evaluations)
    return ModelCardData(
        **_lineage(checkpoint),
        **terms_for_metadata(checkpoint, extras),
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


def _lineage(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the models on the Hub that this one has something of: the nearest before it, or its dense parents."""
    nearest = [parent_of(step["source"], step.get("terms")) for step in checkpoint.steps[::-1] if step.get("source")]
    dense = [] if checkpoint.is_from_scratch else first_parents(checkpoint)
    names = [parent.name for parent in nearest if parent.is_hub_id][:1] or base_models(dense)
    if not names:
        return {}
    # Of the relations that the Hub knows, none is that of a model that was only converted.
    relation = "merge" if len(names) > 1 else "finetune" if checkpoint.is_trained else None
    lineage: dict[str, Any] = {"base_model": names[0] if len(names) == 1 else names}
    return lineage | ({"base_model_relation": relation} if relation else {})


def _datasets(checkpoint: Checkpoint) -> list[str]:
    """Return the datasets on the Hub that the model was made with, as far as they were recorded as such."""
    names = [*checkpoint.description.get("calibration_datasets", ())]
    for step in checkpoint.steps:
        names += (step.get("datasets") or ()) if step["command"] == "train" else ()
    return list(dict.fromkeys(names))


def _tags(checkpoint: Checkpoint) -> list[str]:
    tags = []
    if checkpoint.num_experts is not None:
        tags += ["moe", "mixture-of-experts"]
    if checkpoint.is_upcycled:
        tags.append("custom_code")
    if checkpoint.parents and not checkpoint.is_from_scratch:
        tags.append("upcycling")
    return [*tags, *(f"arxiv:{number}" for number in papers_of(checkpoint))]
