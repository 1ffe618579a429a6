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

from .numbers import format_bytes, format_count
from .plan import ConversionPlan
from .report import RouterReport
from .writer import write_text


CARD_FILE = "README.md"


def write_card(folder: Path, plan: ConversionPlan, reports: list[RouterReport] | None) -> None:
    """Write the model card into `folder`."""
    write_text(folder / CARD_FILE, render_card(plan, reports))


def render_card(plan: ConversionPlan, reports: list[RouterReport] | None) -> str:
    """Return the model card of a conversion by `plan`, with what its fresh routers do."""
    source, recipe, config = plan.source, plan.recipe, plan.config
    parent_card = _parent_card(source.folder)
    is_hub_id = _is_hub_id(source.name) and not Path(source.name).exists()
    parent = source.name if is_hub_id else Path(source.name).resolve().name
    is_causal_lm = config.architectures[0].endswith("ForCausalLM")
    title = f"{parent.split('/')[-1]}-{config.num_experts}x-MoE"
    card_data = ModelCardData(
        base_model=parent if is_hub_id else None,
        license=parent_card.license,
        license_name=parent_card.get("license_name"),
        license_link=parent_card.get("license_link"),
        language=parent_card.language,
        library_name="transformers",
        pipeline_tag="text-generation" if is_causal_lm else "text-classification",
        datasets=[name for name in recipe.calibration_data if _is_hub_dataset(name)] or None,
        tags=["moe", "mixture-of-experts", "upcycling", "custom_code", f"arxiv:{plan.router.paper}"],
    )
    values: dict[str, Any] = {
        "title": title,
        "source_name": parent,
        "base_model_is_hub_id": is_hub_id,
        "preserves_function": plan.preserves_function == "exact",
        "total_parameters": format_count(plan.total_parameters),
        "active_parameters": format_count(plan.active_parameters),
        "num_layers": config.num_hidden_layers,
        "num_moe_layers": len(config.moe_layers),
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "experts": recipe.experts,
        "router": f"{recipe.router}: {plan.router.describe()}",
        "method": plan.router.method,
        "paper": plan.router.paper,
        "is_classifier": not is_causal_lm,
        "auto_class": "AutoModelForCausalLM" if is_causal_lm else "AutoModelForSequenceClassification",
        "has_tokenizer": source.has_tokenizer,
        "dtype": ", ".join(sorted({tensor.dtype for tensor in plan.tensors})),
        "size": format_bytes(plan.num_bytes),
        "routers": reports,
        "calibration_tokens": f"{recipe.num_calibrated_tokens:,}",
        "calibration_data": ", ".join(
            f"`{name if _is_hub_dataset(name) else Path(name).name}`" for name in recipe.calibration_data
        ),
        "uniform_entropy": f"{math.log(config.num_experts):.3f}",
        "balanced_load": f"{1 / config.num_experts:.3f}",
    }
    template = files("upcycled_moe.model_cards").joinpath("template.md").read_text(encoding="utf-8")
    return str(ModelCard.from_template(card_data, template_str=template, **values)).rstrip() + "\n"


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
