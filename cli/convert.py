"""`upcycled-moe convert`: a dense Qwen checkpoint becomes a Mixture-of-Experts one."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .plan import print_plan
from .recipe_options import add_recipe_options, recipe_from
from .verify import print_verification


if TYPE_CHECKING:
    from ..conversion.convert import ConversionResult


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "convert",
        usage="%(prog)s DENSE OUT [options]",
        help="convert a dense checkpoint",
        description="Convert a dense Qwen checkpoint into a Mixture-of-Experts one.",
    )
    parser.add_argument("dense", metavar="DENSE", help="dense Qwen checkpoint: folder or Hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write; it appears only when all is written")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and write nothing")
    parser.add_argument("--verify", action="store_true", help="then compare the result with the dense model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_recipe_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    recipe = recipe_from(options)
    out = Path(options.out)

    from ..conversion.convert import convert
    from ..conversion.plan import build_plan
    from ..conversion.source import open_source
    from ..conversion.writer import check_kept, check_output
    from .console import ConsoleProgress, quiet_libraries

    if options.recipe:
        check_kept(out, [Path(options.recipe)])
    quiet_libraries()
    source = open_source(options.dense, recipe.revision, weights=not options.dry_run)
    if options.dry_run:
        plan = build_plan(source, recipe)
        check_output(plan, out, options.overwrite)
        print_plan(plan, out, options.json)
        return 0
    result = convert(source, recipe, out, overwrite=options.overwrite, progress=ConsoleProgress())
    verification = None
    if options.verify:
        from ..conversion.verify import verify

        verification = verify(str(source.folder), str(out))
    if options.json:
        output = json.loads((out / "upcycling.json").read_text(encoding="utf-8"))
        if verification is not None:
            output["verification"] = verification.to_dict()
        print(json.dumps(output, indent=2))
    else:
        print_result(result)
        if verification is not None:
            print_verification(verification)
    return 0 if verification is None or verification.equal else 3


def print_result(result: "ConversionResult") -> None:
    """Print what was written and what the fresh routers do."""
    from rich.table import Table

    from ..conversion.numbers import format_bytes, format_count
    from .console import stdout_console

    console, plan = stdout_console(), result.plan
    if result.routers is not None:
        experts = plan.config.num_experts
        table = Table(title=f"Fresh routers on {plan.recipe.num_calibrated_tokens:,} tokens", title_justify="left")
        for column in ("Layer", "Logit std", "Entropy", "Least load", "Most load", "Dead experts"):
            table.add_column(column, justify="right")
        for row in result.routers:
            table.add_row(
                str(row.layer),
                f"{row.logit_std:.3g}",
                f"{row.entropy:.3f}",
                f"{min(row.load):.3f}",
                f"{max(row.load):.3f}",
                f"{row.dead_experts} of {experts}",
            )
        console.print(table)
    console.print(
        f"Wrote {result.folder}: {format_bytes(plan.num_bytes)}, {format_count(plan.total_parameters)} parameters, "
        f"{format_count(plan.active_parameters)} active.",
        soft_wrap=True,
        markup=False,
    )
