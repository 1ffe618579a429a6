"""`upcycled-moe export`: an upcycled checkpoint becomes one of a stock architecture, without code of its own."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .derived_options import add_output_options, add_places, max_shard_bytes
from .push_options import add_push_options, checked_destination, print_destination, push_and_print


if TYPE_CHECKING:
    from ..export.export import ExportPlan

MEMORY_ADVICE = "close what else runs"


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "export",
        usage="%(prog)s CKPT OUT [options]",
        help="write a stock Qwen-MoE or Mixtral checkpoint",
        description="Write an upcycled checkpoint as one of a stock architecture, which needs no code of its own, "
        "where that computes exactly the same in Transformers. Otherwise the command says what would be lost, and "
        "exits with status 2. Notes say where vLLM or llama.cpp computes something else, or cannot load it.",
    )
    add_places(parser)
    parser.add_argument(
        "--to",
        choices=("qwen3_moe", "qwen2_moe", "mixtral", "auto"),
        default="auto",
        help="architecture (default: auto, the first of these that is exact)",
    )
    add_output_options(parser)
    add_push_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from ..common.derived_checkpoint import check_derived
    from ..common.moe_source import open_moe
    from ..export.export import export, plan_export
    from .console import ConsoleProgress, quiet_libraries

    shard_bytes = max_shard_bytes(options)
    quiet_libraries()
    destination, progress = checked_destination(options), ConsoleProgress()
    source, out = open_moe(options.checkpoint, options.revision), Path(options.out)
    plan = plan_export(source, options.to, shard_bytes)
    if options.dry_run:
        check_derived(plan.derived, out, (), options.overwrite)
    else:
        export(plan, out, overwrite=options.overwrite, progress=progress)
    if not options.json:
        print_plan(plan, out, options.dry_run)
        if options.dry_run:
            print_destination(destination)
    # A dry run pushes nothing either.
    pushed_to = None if options.dry_run else destination
    push_and_print(out, pushed_to, plan.to_dict() if options.json else None, progress)
    return 0


def print_plan(plan: "ExportPlan", out: Path, dry_run: bool) -> None:
    """Print what was written to `out`, or would be."""
    from ..common.numbers import format_bytes, format_count

    print(f"{plan.choice.target.name} ({plan.derived.config.architectures[0]}): {plan.choice.reason}.")
    for name, obstacles in plan.choice.rejected.items():
        print(f"Not {name}: {', and '.join(obstacles)}.")
    for note in plan.notes:
        print(f"Note: {note}")
    print(
        f"{'Would write' if dry_run else 'Wrote'} {out}: {format_bytes(plan.derived.num_bytes)}, "
        f"{format_count(plan.derived.total_parameters)} parameters."
    )
