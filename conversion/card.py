"""The model card of a fresh checkpoint, filled with its own figures."""

import math
from glob import has_magic
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from ..common.files import write_text
from ..common.numbers import format_bytes, format_count
from .description import describe_model, limits, num_active
from .papers import papers
from .plan import ConversionPlan
from .report import RouterReport
from .source import DenseSource


CARD_FILE = "README.md"


def write_card(folder: Path, plan: ConversionPlan, reports: list[RouterReport] | None) -> None:
    """Write the model card into `folder`."""
    write_text(folder / CARD_FILE, render_card(plan, reports))


def render_card(plan: ConversionPlan, reports: list[RouterReport] | None) -> str:
    """Return the model card of a conversion by `plan`, with what its fresh routers do."""
    recipe, config = plan.recipe, plan.config
    parents = [_parent(source) for source in plan.sources]
    is_causal_lm = config.architectures[0].endswith("ForCausalLM")
    numbers = papers(recipe)
    card_data = ModelCardData(
        **({} if recipe.is_from_scratch else _lineage(plan, parents)),
        library_name="transformers",
        pipeline_tag="text-generation" if is_causal_lm else "text-classification",
        datasets=[name for name in recipe.calibration_data if _is_hub_dataset(name)] or None,
        tags=[
            *("moe", "mixture-of-experts", "custom_code"),
            *([] if recipe.is_from_scratch else ["upcycling"]),
            *(f"arxiv:{number}" for number in numbers),
        ],
    )
    values: dict[str, Any] = {
        "title": f"{parents[0]['name'].split('/')[-1]}-{config.num_experts}x-MoE",
        "parents": parents,
        "is_from_scratch": recipe.is_from_scratch,
        "preserves_function": plan.preserves_function,
        "preservation_reason": plan.preservation_reason,
        "total_parameters": format_count(plan.total_parameters),
        "active_parameters": format_count(plan.active_parameters),
        "num_experts": config.num_experts,
        "num_free_experts": recipe.num_free_experts,
        "num_active": num_active(plan),
        "description": describe_model(plan, [parent["name"] for parent in parents]),
        "router": f"{recipe.router}: {plan.router.describe()}",
        "method": plan.router.method,
        "paper": numbers[0] if numbers else None,
        "other_papers": numbers if recipe.is_from_scratch else numbers[1:],
        "limits": limits(plan),
        "is_classifier": not is_causal_lm,
        "auto_class": "AutoModelForCausalLM" if is_causal_lm else "AutoModelForSequenceClassification",
        "has_tokenizer": plan.source.has_tokenizer,
        "dtype": ", ".join(sorted({tensor.dtype for tensor in plan.tensors})),
        "size": format_bytes(plan.num_bytes),
        "routers": reports,
        "calibration_tokens": f"{recipe.num_calibrated_tokens:,}",
        "calibration_data": ", ".join(
            f"`{name if _is_hub_dataset(name) else Path(name).name}`" for name in recipe.calibration_data
        ),
        "uniform_entropy": f"{math.log(config.num_routed_experts):.3f}",
        "balanced_load": f"{1 / config.num_routed_experts:.3f}",
    }
    template = files("upcycled_moe.model_cards").joinpath("template.md").read_text(encoding="utf-8")
    return str(ModelCard.from_template(card_data, template_str=template, **values)).rstrip() + "\n"


def _parent(source: DenseSource) -> dict[str, Any]:
    is_hub_id = _is_hub_id(source.name) and not Path(source.name).exists()
    return {"name": source.name if is_hub_id else Path(source.name).resolve().name, "is_hub_id": is_hub_id}


def _lineage(plan: ConversionPlan, parents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the card says of the parents, for a model that has something of them."""
    hub_ids = [parent["name"] for parent in parents if parent["is_hub_id"]]
    base_model = (hub_ids[0] if len(hub_ids) == 1 else hub_ids) or None
    return {"base_model": base_model, **_inherited([_parent_card(source.folder) for source in plan.sources])}


def _inherited(cards: list[ModelCardData]) -> dict[str, Any]:
    """Return what the parents' cards agree on: a licence that only some of them have is not the result's."""
    values = [
        {name: card.get(name) for name in ("license", "license_name", "license_link", "language")} for card in cards
    ]
    return {name: value for name, value in values[0].items() if all(other[name] == value for other in values)}


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _is_hub_dataset(name: str) -> bool:
    return _is_hub_id(name.partition(":")[0]) and not Path(name).exists() and not has_magic(name)


def _parent_card(folder: Path) -> ModelCardData:
    """Return what the parent's own card declares, nothing if it did not come along or cannot be read."""
    card = folder / CARD_FILE
    try:
        return ModelCard.load(card, ignore_metadata_errors=True).data if card.is_file() else ModelCardData()
    except (ValueError, YAMLError):
        return ModelCardData()
