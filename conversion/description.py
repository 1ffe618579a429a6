"""What a converted model is, in words: for a person at the command line and for the model card."""

from collections.abc import Mapping, Sequence
from typing import Any

from modeling_upcycled_moe import SELECTIONS

from ..common.output_factors import output_factors
from .backbone import backbone_method
from .experts import EXPERTS
from .plan import ConversionPlan
from .recipe import ConversionRecipe


def describe_model(plan: ConversionPlan, source_names: Sequence[str]) -> dict[str, str]:
    """Return the lines on sources, experts and selection; what a model has nothing of has no line.

    Args:
        source_names: how the dense models are called.
    """
    recipe, config = plan.recipe, plan.config
    num_moe_layers, num_layers = len(config.moe_layers), config.num_hidden_layers
    which = ", ".join(layers for layers, _ in runs(dict.fromkeys(config.moe_layers)))
    lines = {"Source": f"{source_names[0]} ({config.base_model_type}, {num_layers} layers)"}
    if len(source_names) > 1:
        lines["More sources"] = ", ".join(source_names[1:])
    lines["MoE layers"] = f"{num_moe_layers} of {num_layers}" + f": {which}" * (num_moe_layers < num_layers)
    lines["Experts"] = f"{config.num_experts} a layer, {num_active(plan)} active: {_describe_experts(plan)}"
    if recipe.shared_expert != "none":
        lines["Shared expert"] = _describe_shared_expert(recipe)
    if recipe.num_free_experts:
        kinds = {kind: getattr(config, f"num_{kind}_experts") for kind in ("zero", "copy", "constant")}
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        lines["Free experts"] = f"{counts}; routers choose among {config.num_routed_experts}"
    lines["Selection"] = _describe_selection(plan)
    if (method := backbone_method(recipe)) != "copy":
        lines["Other weights"] = {"average": "the mean of all sources", "random": "drawn at random"}[method]
    return lines


def num_active(plan: ConversionPlan) -> str:
    """Return how many experts a token goes to."""
    config = plan.config
    is_less = config.has_empty_slots and SELECTIONS[config.router_selection].in_evaluation is None
    return "at most " * is_less + str(config.num_experts_per_tok)


def fresh_limits(plan: ConversionPlan) -> list[str]:
    """Return what is to be known of the fresh model only, in sentences."""
    recipe = plan.recipe
    equal = {"copy": "Experts", "split": "Experts with the same slice"}.get(recipe.experts)
    if not equal or recipe.num_ffn_copies <= recipe.num_sources:
        return []
    of_one_parent = " from the same parent" * (len(plan.sources) > 1)
    return [f"{equal}{of_one_parent} start equal and learn to differ only in training."]


def lasting_limits(plan: ConversionPlan) -> list[str]:
    """Return what is to be known of the model after training too, in sentences."""
    selection = SELECTIONS[plan.config.router_selection]
    if selection.in_evaluation is None:
        return []
    return [
        "In training, experts choose among all tokens of a batch, so that a token's experts depend on later "
        f"tokens: not causal. Evaluation and generation use {selection.in_evaluation} and are causal."
    ]


def runs(rows: Mapping[int, Any]) -> list[tuple[str, Any]]:
    """Join neighbouring layers with equal rows: `0-23` instead of 24 lines."""
    joined: list[list] = []
    for layer, row in rows.items():
        if joined and joined[-1][1] == layer - 1 and joined[-1][2] == row:
            joined[-1][1] = layer
        else:
            joined.append([layer, layer, row])
    return [(str(first) if first == last else f"{first}-{last}", row) for first, last, row in joined]


def _describe_experts(plan: ConversionPlan) -> str:
    text = EXPERTS[plan.recipe.experts].describe(plan.recipe)
    if plan.config.moe_intermediate_size != plan.config.intermediate_size:
        text += f" {plan.config.moe_intermediate_size} wide"
    return text + f", from {len(plan.sources)} sources in equal shares" * (len(plan.sources) > 1)


def _describe_shared_expert(recipe: ConversionRecipe) -> str:
    weight = {
        "sigmoid": "weight by a sigmoid gate",
        "plain": "weight 1",
        "complement": "weight 1 - highest probability",
    }.get(recipe.shared_expert, recipe.shared_expert)
    factors = output_factors(recipe.experts, recipe.backbone, recipe.shared_expert)
    halved = [name for name, factor in zip(("routed", "shared"), factors, strict=True) if factor != 1]
    # It is of the same making as all but the routed experts.
    start = {"copy": "a copy of the FFN", "average": "the mean of the FFNs", "random": "drawn at random"}
    return f"{start[backbone_method(recipe)]}, {weight}" + f", {' and '.join(halved)} outputs halved" * bool(halved)


def _describe_selection(plan: ConversionPlan) -> str:
    config = plan.config
    score, k, groups = config.router_score_function, config.num_experts_per_tok, config.num_expert_groups or 1
    parts = {
        "top_k": [score, f"top {k}"],
        "grouped_top_k": [score, f"top {k // groups} of each of {groups} groups"],
        "prototype_top_k": [f"{score} within each of {groups} groups", f"top {k // groups} of each"],
        "top_p": [score, f"the best until they sum to {config.router_top_p}, at most {k}"],
        "expert_choice": [score, f"experts choose in training, else top {k}"],
    }.get(config.router_selection, [score, config.router_selection])
    weights = "weights sum to one" if config.norm_topk_prob else "weights are the scores"
    if config.shared_expert_gating == "complement":
        weights = "weights sum to the highest probability"
    parts.append(weights)
    if config.use_router_bias:
        parts.append("balanced by a bias")
    if config.router_jitter_noise:
        parts.append(f"jitter of {config.router_jitter_noise:g} in training")
    return ", ".join(parts)
