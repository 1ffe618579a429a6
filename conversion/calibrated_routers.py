"""Routers that start from, or are tried on, calibration text."""

from typing import TYPE_CHECKING

import torch

from modeling_upcycled_moe import ROUTERS

from ..common.routing import router_metrics
from .calibration import LayerActivations, best_device, calibrate, calibration_blocks
from .heads import coinciding_keys
from .plan import ConversionPlan
from .report import RouterReport, report_router
from .routers import router_contents
from .source import DTYPES
from .writer import Content


if TYPE_CHECKING:
    from .convert import Progress


def calibrated_routers(plan: ConversionPlan, progress: "Progress") -> tuple[dict[str, Content], list[RouterReport]]:
    """Return the content of every router tensor by name, and what each router does on the calibration text."""
    recipe, layers = plan.recipe, plan.config.moe_layers
    contents: dict[str, Content] = {}
    reports = []
    blocks = calibration_blocks(plan.source, recipe)
    with progress.task("Calibrating", max(layers) + 1, "layers") as advance:
        for activations in calibrate(
            plan.source,
            blocks,
            layers,
            attended=plan.router.attended_keys,
            batch_size=recipe.calibration_batch_size,
            device=best_device(),
            on_layer=lambda: advance(1),
        ):
            tensors = plan.router.tensors(activations.layer, activations)
            tensors, report = _scaled_and_measured(plan, activations, tensors)
            contents |= router_contents(activations.layer, tensors)
            reports.append(report)
    _warn_of_degenerate_routers(plan, reports, progress)
    return contents, reports


@torch.no_grad()
def _scaled_and_measured(
    plan: ConversionPlan, layer: LayerActivations, contents: dict[str, Content]
) -> tuple[dict[str, Content], RouterReport]:
    """Return the router with its logits scaled as the recipe asks, and what it does on the text that `layer` saw."""
    target, top_k = plan.recipe.target_logit_std, plan.config.num_experts_per_tok
    scores = _router_scores(plan, layer, contents)
    measured = router_metrics(scores, top_k)["logit_std"]
    if target is not None and measured > 0:
        name = plan.router.scaled_tensor
        contents = contents | {name: contents[name] * (target / measured)}
        scores = _router_scores(plan, layer, contents)
    keys = contents.get("keys")
    return contents, report_router(
        layer.layer,
        scores,
        top_k,
        unscaled_logit_std=measured,
        coinciding_keys=None if keys is None else coinciding_keys(keys),
    )


def _router_scores(plan: ConversionPlan, layer: LayerActivations, contents: dict[str, Content]) -> torch.Tensor:
    """Return the logits [T, E] of the text that `layer` saw, by the router as it will be read from the file."""
    router = ROUTERS[plan.config.router_type](plan.config).eval()
    dtypes = {tensor.name: DTYPES[tensor.dtype] for tensor in plan.tensors}
    for name, parameter in router.named_parameters():
        content = contents[name]
        value = content if isinstance(content, torch.Tensor) else content.load()
        written = value.to(dtypes[f"model.layers.{layer.layer}.mlp.gate.{name}"])
        parameter.data.copy_(written.reshape(parameter.shape))
    router.to(layer.ffn_inputs[0].device)
    return torch.cat([router.score(tokens.float()) for tokens in layer.ffn_inputs])


def _warn_of_degenerate_routers(plan: ConversionPlan, reports: list[RouterReport], progress: "Progress") -> None:
    coinciding = [report for report in reports if report.coinciding_keys]
    if coinciding:
        is_grouped_query = plan.config.num_key_value_heads < plan.config.num_attention_heads
        reason = (
            "heads that share a key-value head have the same mean key; use key_statistic='attended'"
            if is_grouped_query and plan.recipe.key_statistic == "mean"
            else "there are fewer different groups of heads than keys; another num_routers or heads_per_router helps"
        )
        progress.warn(
            f"Keys coincide in {len(coinciding)} of {len(reports)} layers (layer {coinciding[0].layer}: "
            f"{coinciding[0].coinciding_keys} of {plan.config.num_router_keys}), so their experts compete for the "
            f"same tokens: {reason}."
        )
    dead = [report for report in reports if report.dead_experts]
    if dead:
        progress.warn(
            f"Experts get no token in {len(dead)} of {len(reports)} layers (most: "
            f"{max(report.dead_experts for report in dead)} of {plan.config.num_experts}); training may wake them, "
            "a larger router_aux_loss_coef helps."
        )
