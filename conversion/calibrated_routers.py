"""Routers that start from, or are tried on, calibration text."""

import torch

from modeling_upcycled_moe import ROUTERS

from ..common.devices import best_device
from ..common.progress import Progress
from ..common.routing import router_metrics
from ..common.streaming.stored import DTYPES
from .calibration import LayerActivations, calibrate, calibration_blocks
from .heads import coinciding_keys
from .plan import ConversionPlan
from .report import RouterReport, report_router
from .routers import RouterContent, load_content, one_for_all_slices, router_contents, router_tensor_name


def calibrated_routers(
    plan: ConversionPlan, progress: Progress
) -> tuple[dict[str, RouterContent], list[RouterReport]]:
    """Return the content of every router tensor by name, and what each router does on the calibration text."""
    recipe, layers = plan.recipe, plan.config.moe_layers
    contents: dict[str, RouterContent] = {}
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
            num_domains=recipe.num_domains,
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
    plan: ConversionPlan, layer: LayerActivations, contents: dict[str, RouterContent]
) -> tuple[dict[str, RouterContent], RouterReport]:
    """Return the router with its logits scaled as the recipe asks, and what it does on the text that `layer` saw."""
    target = plan.recipe.target_logit_std
    logits, selected = _routed(plan, layer, contents)
    measured = router_metrics(logits, selected, plan.config)["logit_std"]
    if target is not None and measured > 0:
        name = plan.router.scaled_tensor
        contents = contents | {name: load_content(contents[name]) * (target / measured)}
        logits, selected = _routed(plan, layer, contents)
    keys = contents.get("keys")
    return contents, report_router(
        layer.layer,
        logits,
        selected,
        plan.config,
        unscaled_logit_std=measured,
        coinciding_keys=None if keys is None else coinciding_keys(one_for_all_slices(keys, plan.recipe)),
    )


def _routed(
    plan: ConversionPlan, layer: LayerActivations, contents: dict[str, RouterContent]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [T, E] and selected experts [T, K] of the text that `layer` saw.

    They are those of the router as it will be read from the file, in evaluation mode.
    """
    router = ROUTERS[plan.config.router_type](plan.config).eval()
    dtypes = {tensor.name: DTYPES[tensor.dtype] for tensor in plan.tensors}
    for name, parameter in router.named_parameters():
        written = load_content(contents[name]).to(dtypes[router_tensor_name(layer.layer, name)])
        parameter.data.copy_(written.reshape(parameter.shape))
    router.to(layer.ffn_inputs[0].device)
    routed = [router(tokens.float()) for tokens in layer.ffn_inputs]
    return torch.cat([logits for logits, _, _ in routed]), torch.cat([selected for _, _, selected in routed])


def _warn_of_degenerate_routers(plan: ConversionPlan, reports: list[RouterReport], progress: Progress) -> None:
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
            f"{coinciding[0].coinciding_keys} of {plan.router.split.num_keys}), so their experts compete for the "
            f"same tokens: {reason}."
        )
    dead = [report for report in reports if report.dead_experts]
    if dead:
        num_heads = plan.config.num_attention_heads
        lower_num_routers = (
            f", num_routers={plan.config.num_routers} makes routers of parts of the {num_heads} heads, and at most "
            f"{num_heads} are wider"
            if plan.config.router_type == "mixture" and plan.config.num_routers > num_heads
            else ""
        )
        progress.warn(
            f"Experts get no token in {len(dead)} of {len(reports)} layers (most: "
            f"{max(report.dead_experts for report in dead)} of {plan.config.num_routed_experts}); training may wake "
            f"them, a larger router_aux_loss_coef helps{lower_num_routers}."
        )
