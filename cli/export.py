"""`upcycled-moe export`: an upcycled checkpoint becomes one of a stock architecture, without code of its own."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .push_options import add_push_options, checked_destination, push_result, with_push


if TYPE_CHECKING:
    from ..export.export import ExportPlan

MEMORY_ADVICE = "close what else runs"
MAX_SHARD_SIZE = "5GB"


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "export",
        usage="%(prog)s CKPT OUT [options]",
        help="write a stock Qwen-MoE or Mixtral checkpoint",
        description="Write an upcycled checkpoint as one of a stock architecture, which needs no code of its own: "
        "Transformers, vLLM, SGLang and llama.cpp know it. Only where that computes exactly the same; otherwise the "
        "command says what would be lost, and exits with status 2.",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="upcycled checkpoint: folder or Hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write; it appears only when all is written")
    parser.add_argument(
        "--to",
        choices=("qwen3_moe", "qwen2_moe", "mixtral", "auto"),
        default="auto",
        help="architecture (default: auto, the first of these that is exact)",
    )
    parser.add_argument("--revision", help="branch, tag or commit of CKPT on the Hub")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default=MAX_SHARD_SIZE, help="of a weight file (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written and write nothing")
    add_push_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from ..common.derived_checkpoint import check_derived
    from ..common.moe_source import open_moe
    from ..common.settings import parse_size
    from ..export.export import export, plan_export
    from .console import ConsoleProgress, quiet_libraries

    max_shard_bytes = parse_size("max_shard_size", options.max_shard_size)
    quiet_libraries()
    destination, progress = checked_destination(options), ConsoleProgress()
    source, out = open_moe(options.checkpoint, options.revision), Path(options.out)
    plan = plan_export(source, options.to, max_shard_bytes)
    if options.dry_run:
        check_derived(plan.derived, out, (), options.overwrite)
    else:
        export(plan, out, overwrite=options.overwrite, progress=progress)
    if not options.json:
        print_plan(plan, out, options.dry_run)
    pushed = None if options.dry_run else push_result(options, out, destination, progress)
    if options.json:
        print(json.dumps(with_push(plan.to_dict(), pushed), indent=2))
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
