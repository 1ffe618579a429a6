"""`upcycled-moe plan`: what a conversion would write, before it writes anything."""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .recipe_options import add_places, add_recipe_options, open_model, recipe_from


if TYPE_CHECKING:
    from ..conversion.plan import ConversionPlan
    from ..conversion.recipe import ConversionRecipe


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "plan",
        usage="%(prog)s [DENSE [OUT]] [options]",
        help="show what a conversion would write",
        description="Show every tensor, file and byte that a conversion would write, and write nothing. A single "
        "argument is DENSE; it wins over the recipe's model.",
    )
    add_places(
        parser,
        "dense Qwen checkpoint: folder or Hub id; may be left out if the recipe names one",
        "folder to check the free disk of (default: .)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_recipe_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    dense, out = [*options.places, *(None, ".")[len(options.places) :]]
    recipe = recipe_from(options, dense)

    from ..conversion.plan import build_plan
    from .console import quiet_libraries

    quiet_libraries()
    source, recipe = open_model(recipe, weights=False)
    print_plan(build_plan(source, recipe), Path(out), options.json)
    return 0


def print_plan(plan: "ConversionPlan", out: Path, as_json: bool) -> None:
    """Print `plan` to stdout, for a person or as JSON."""
    if as_json:
        print(json.dumps(plan.to_dict(out), indent=2))
        return

    from rich.markup import escape
    from rich.table import Table

    from ..conversion.numbers import format_bytes, format_count
    from ..conversion.plan import free_disk_bytes, router_plans
    from .console import results_table, stdout_console

    console = stdout_console()
    summary = Table(show_header=False, box=None, pad_edge=False)
    for name, value in {
        **_describe_model(plan),
        "Preserves the function": f"{plan.preserves_function}: {plan.preservation_reason}",
        "Parameters": f"{format_count(plan.total_parameters)} total, {format_count(plan.active_parameters)} active",
        "FLOPs per token": f"{format_count(plan.flops_per_token)} forward, attention scores not counted",
        "Size": f"{format_bytes(plan.num_bytes)} in {len(plan.shards)} file{'s' * (len(plan.shards) > 1)}",
        "Peak memory": f"about {format_bytes(plan.peak_memory_bytes)}",
        "Free disk": format_bytes(free_disk_bytes(out)),
    }.items():
        summary.add_row(f"[bold]{name}[/]", escape(value))
    console.print(summary)

    routers = results_table(
        "Routers (folds: into a linear one)",
        *("Layers", "Type", "Starts from", "Parameters", "Folds"),
        numbers=("Parameters",),
    )
    for layers, router in _runs({router.layer: replace(router, layer=0) for router in router_plans(plan)}):
        folds = "yes" if router.folds else "no"
        routers.add_row(layers, router.router, router.initialization, format_count(router.parameters), folds)

    tensors = results_table("Tensors (N: layer)", "Name", "Type", "Shape", "Count", numbers=("Count",))
    counts: dict[tuple[str, str, str], int] = {}
    for tensor in plan.tensors:
        name = re.sub(r"layers\.\d+\.", "layers.N.", tensor.name)
        key = (name, tensor.dtype, " × ".join(map(str, tensor.shape)))
        counts[key] = counts.get(key, 0) + 1
    for key, count in counts.items():
        tensors.add_row(*key, str(count))

    shards = results_table("Files", "Name", "Tensors", "Size", numbers=("Tensors", "Size"))
    for shard in plan.shards:
        shards.add_row(shard.file_name, str(len(shard.tensors)), format_bytes(shard.num_bytes))

    for table in (routers, tensors, shards):
        console.print()
        console.print(table)


def _describe_model(plan: "ConversionPlan") -> dict[str, str]:
    """Return the lines on sources, experts and selection; what a model has nothing of has no line."""
    from ..conversion.backbone import backbone_method

    recipe, config = plan.recipe, plan.config
    num_moe_layers, num_layers = len(config.moe_layers), config.num_hidden_layers
    which = ", ".join(layers for layers, _ in _runs(dict.fromkeys(config.moe_layers)))
    lines = {"Source": f"{plan.source.name} ({config.base_model_type}, {num_layers} layers)"}
    if len(plan.sources) > 1:
        lines["More sources"] = ", ".join(source.name for source in plan.sources[1:])
    lines["MoE layers"] = f"{num_moe_layers} of {num_layers}" + f": {which}" * (num_moe_layers < num_layers)
    at_most = "at most " * (config.router_selection == "top_p")
    num_active = f"{at_most}{config.num_experts_per_tok} active"
    lines["Experts"] = f"{config.num_experts} a layer, {num_active}: {_describe_experts(plan)}"
    if recipe.shared_expert != "none":
        lines["Shared expert"] = _describe_shared_expert(recipe)
    kinds = {kind: getattr(config, f"num_{kind}_experts") for kind in ("zero", "copy", "constant")}
    if any(kinds.values()):
        lines["Free experts"] = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    lines["Selection"] = _describe_selection(plan)
    if (method := backbone_method(recipe)) != "copy":
        lines["Other weights"] = {"average": "the mean of all sources", "random": "drawn at random"}[method]
    return lines


def _describe_experts(plan: "ConversionPlan") -> str:
    from ..conversion.experts import EXPERTS

    text = EXPERTS[plan.recipe.experts].describe(plan.recipe)
    if plan.config.moe_intermediate_size != plan.config.intermediate_size:
        text += f" {plan.config.moe_intermediate_size} wide"
    return text + f", from {len(plan.sources)} sources in equal shares" * (len(plan.sources) > 1)


def _describe_shared_expert(recipe: "ConversionRecipe") -> str:
    from ..conversion.experts import output_factors

    weight = {
        "sigmoid": "weight by a sigmoid gate",
        "plain": "weight 1",
        "complement": "weight 1 - highest probability",
    }.get(recipe.shared_expert, recipe.shared_expert)
    halved = [name for name, factor in zip(("routed", "shared"), output_factors(recipe), strict=True) if factor != 1]
    return f"a copy of the FFN, {weight}" + f", {' and '.join(halved)} outputs halved" * bool(halved)


def _describe_selection(plan: "ConversionPlan") -> str:
    config = plan.config
    score, k, groups = config.router_score_function, config.num_experts_per_tok, config.num_expert_groups or 1
    parts = {
        "top_k": [score, f"top {k}"],
        "grouped_top_k": [score, f"top {k // groups} of each of {groups} groups"],
        "prototype_top_k": [f"{score} within each of {groups} groups", f"top {k // groups} of each"],
        "top_p": [score, f"the best until they sum to {config.router_top_p}, at most {k}"],
        "expert_choice": [score, f"experts choose in training, else top {k}"],
    }.get(config.router_selection, [score, config.router_selection])
    parts.append("weights sum to one" if config.norm_topk_prob else "weights are the scores")
    if config.use_router_bias:
        parts.append("balanced by a bias")
    if config.router_jitter_noise:
        parts.append(f"jitter of {config.router_jitter_noise:g} in training")
    return ", ".join(parts)


def _runs(rows: dict[int, object]) -> list[tuple[str, object]]:
    """Join neighbouring layers with equal rows: `0-23` instead of 24 lines."""
    runs: list[list] = []
    for layer, row in rows.items():
        if runs and runs[-1][1] == layer - 1 and runs[-1][2] == row:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer, row])
    return [(str(first) if first == last else f"{first}-{last}", row) for first, last, row in runs]
