"""What a conversion tells the model card, its own and those of all that is made of its result."""

from typing import Any

from ..common.hub_names import hub_datasets
from ..common.provenance import recorded_name
from ..model_cards.checkpoint import Checkpoint, Weights, parent_of
from ..model_cards.terms import read_terms
from ..model_cards.training import shown_source
from .description import describe_model, fresh_limits, lasting_limits, num_active
from .papers import papers
from .plan import ConversionPlan
from .source import DenseSource


def describe_result(plan: ConversionPlan) -> dict[str, Any]:
    """Return what a conversion by `plan` records of its result in words, and of the terms of its parents."""
    recipe = plan.recipe
    names = [parent_of(_record(source)).name for source in plan.sources]
    return {
        "lines": describe_model(plan, names),
        "router": f"{recipe.router}: {plan.router.describe()}",
        "method": plan.router.method,
        "papers": papers(recipe),
        "num_active": num_active(plan),
        "preserves_function": plan.preserves_function,
        "preservation_reason": plan.preservation_reason,
        "fresh_limits": fresh_limits(plan),
        "limits": lasting_limits(plan),
        "calibration_data": [shown_source(name) for name in recipe.calibration_data],
        "calibration_datasets": hub_datasets(recipe.calibration_data),
        "num_calibrated_tokens": recipe.num_calibrated_tokens,
        "terms": [read_terms(source.folder) for source in plan.sources],
    }


def planned_checkpoint(plan: ConversionPlan) -> Checkpoint:
    """Return what a card can say of the result of `plan` before it is written: all but what is measured."""
    source, *others = map(_record, plan.sources)
    return Checkpoint(
        name=source["name"],
        config=plan.config.to_dict(),
        provenance={
            "source": source,
            "expert_sources": others,
            "recipe": plan.recipe.to_dict(),
            "description": describe_result(plan),
        },
        weights=Weights(
            dtypes=tuple(sorted({tensor.dtype for tensor in plan.tensors})),
            num_bytes=plan.num_bytes,
            total_parameters=plan.total_parameters,
            active_parameters=plan.active_parameters,
        ),
        has_tokenizer=plan.source.has_tokenizer,
    )


def _record(source: DenseSource) -> dict[str, str | None]:
    return {"name": recorded_name(source.name, source.folder), "revision": source.revision}
