"""`upcycled-moe plan`: what a conversion would write, before it writes anything."""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.settings import SettingsError
from .recipe_options import CALIBRATION_MEMORY_ADVICE, add_places, add_recipe_options, open_model, recipe_from


if TYPE_CHECKING:
    from ..conversion.plan import ConversionPlan

MEMORY_ADVICE = CALIBRATION_MEMORY_ADVICE
TRAINING_OPTIONS = ("accelerate", "num_processes", "gpu", "gpu_memory", "mfu")


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "plan",
        usage="%(prog)s [DENSE [OUT]] [options]",
        help="show what a conversion would write, and what training would need",
        description="Show every tensor, file and byte that a conversion would write, and write nothing. A single "
        "argument is DENSE; it wins over the recipe's model. With --train also what training the result would cost; "
        "then DENSE may be a MoE checkpoint as well, of which nothing is converted.",
    )
    add_places(
        parser,
        "dense Qwen checkpoint: folder or Hub id; may be left out if the recipe names one",
        "folder to check the free disk of (default: .)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--train",
        nargs="+",
        metavar="FILE|KEY=VALUE",
        help="settings of train/train.py: files, and single ones that win over them; shows memory per GPU, tokens, "
        "FLOPs and hours of the run",
    )
    training.add_argument("--accelerate", metavar="FILE", help="configuration of accelerate launch (default: one GPU)")
    training.add_argument("--num-processes", type=int, metavar="N", help="GPUs, if not as --accelerate says")
    training.add_argument("--gpu", metavar="NAME", help="such as h100 or a100-40gb (default: the one here, if any)")
    training.add_argument("--gpu-memory", metavar="SIZE", help="memory of a GPU, e.g. 80GB (default: that of the GPU)")
    training.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        help="share of the GPU's peak that the run is assumed to reach, for the hours (default: 0.4)",
    )
    add_recipe_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if options.train is not None:
        from .training_plan import run_training_plan

        return run_training_plan(options)
    for name in TRAINING_OPTIONS:
        if getattr(options, name) is not None:
            raise SettingsError(f"--{name.replace('_', '-')} is of the plan of a training run; give --train too.")
    plan, out = plan_conversion(options)
    print_plan(plan, out, options.json)
    return 0


def plan_conversion(options: argparse.Namespace) -> tuple["ConversionPlan", Path]:
    """Return the plan of the conversion that `options` ask for, and the folder that it would go to."""
    dense, out = [*options.places, *(None, ".")[len(options.places) :]]
    recipe = recipe_from(options, dense)

    from ..conversion.plan import build_plan
    from .console import quiet_libraries

    quiet_libraries()
    source, recipe = open_model(recipe, weights=False)
    return build_plan(source, recipe), Path(out)


def print_plan(plan: "ConversionPlan", out: Path, as_json: bool) -> None:
    """Print `plan` to stdout, for a person or as JSON."""
    if as_json:
        print(json.dumps(plan.to_dict(out), indent=2))
        return

    from rich.markup import escape
    from rich.table import Table

    from ..common.numbers import format_bytes, format_count
    from ..conversion.description import describe_model, runs
    from ..conversion.plan import free_disk_bytes, router_plans
    from .console import results_table, stdout_console

    console = stdout_console()
    summary = Table(show_header=False, box=None, pad_edge=False)
    for name, value in {
        **describe_model(plan, [source.name for source in plan.sources]),
        "Preserves the function": f"{plan.preserves_function}: {plan.preservation_reason}",
        "Parameters": _describe_parameters(plan),
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
    for layers, router in runs({router.layer: replace(router, layer=0) for router in router_plans(plan)}):
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


def _describe_parameters(plan: "ConversionPlan") -> str:
    from ..common.numbers import format_count

    counts = [plan.total_parameters, plan.active_parameters]
    total, active = map(format_count, counts)
    text = f"{total} total, {active} active"
    if plan.tied_head_parameters:
        total, active = (format_count(count + plan.tied_head_parameters) for count in counts)
        text += f" ({total} and {active} if the head, which is the embedding, counts apart)"
    return text
