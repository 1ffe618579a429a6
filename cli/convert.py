"""`upcycled-moe convert`: a dense Qwen checkpoint becomes a Mixture-of-Experts one."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.settings import SettingsError
from .plan import print_plan
from .push_options import add_push_options, checked_destination, print_destination, push_and_print
from .recipe_options import (
    CALIBRATION_MEMORY_ADVICE,
    add_places,
    add_recipe_options,
    find_recipe,
    open_model,
    recipe_from,
)
from .verify import print_verification


if TYPE_CHECKING:
    from ..conversion.convert import ConversionResult
    from ..conversion.plan import ConversionPlan

MEMORY_ADVICE = CALIBRATION_MEMORY_ADVICE


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "convert",
        usage="%(prog)s [DENSE] OUT [options]",
        help="convert a dense checkpoint",
        description="Convert a dense Qwen checkpoint into a Mixture-of-Experts one. A single argument is OUT: then "
        "the recipe or --model names the dense checkpoint. Of two, DENSE wins over the recipe's model.",
    )
    add_places(
        parser,
        "dense Qwen checkpoint: folder or Hub id; may be left out if the recipe names one",
        "folder to write; it appears only when all is written",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and write nothing")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="then compare the result with the dense model, if the recipe preserves its function exactly",
    )
    add_push_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_recipe_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if not options.places:
        options.parser.error("OUT is missing; give DENSE OUT, or OUT and a recipe that names the dense checkpoint.")
    *dense, out = options.places
    recipe, out = recipe_from(options, *dense or [None]), Path(out)

    from ..common.output_folder import check_kept
    from ..conversion.convert import convert
    from ..conversion.output import check_output
    from ..conversion.plan import build_plan
    from .console import ConsoleProgress, quiet_libraries

    if options.recipe is not None:
        check_kept(out, [find_recipe(options.recipe)])
    if not dense:
        _check_not_dense(out)
    quiet_libraries()
    destination = checked_destination(options)
    source, recipe = open_model(recipe, weights=not options.dry_run)
    plan = build_plan(source, recipe) if options.verify or options.dry_run else None
    if options.verify:
        _check_preserved(plan)
    if options.dry_run:
        check_output(plan, out, options.overwrite)
        print_plan(plan, out, options.json)
        if not options.json:
            print_destination(destination)
        return 0
    progress = ConsoleProgress()
    result = convert(source, recipe, out, overwrite=options.overwrite, progress=progress)
    verification = None
    if options.verify:
        from ..conversion.verify import verify

        verification = verify(str(source.folder), str(out))
    if not options.json:
        print_result(result)
        if verification is not None:
            print_verification(verification)
    if verification is not None and not verification.equal:
        destination = None  # what is wrong stays here
    output = None
    if options.json:
        from ..common.provenance import read_provenance

        output = read_provenance(out)
        if verification is not None:
            output["verification"] = verification.to_dict()
    push_and_print(out, destination, output, progress)
    return 0 if verification is None or verification.equal else 3


def _check_preserved(plan: "ConversionPlan") -> None:
    """Check that the result computes what the dense model does, so that a difference is a fault."""
    if plan.preserves_function != "exact":
        raise SettingsError(
            f"--verify tells faults by differences from the dense model, and this recipe makes some: "
            f"{plan.preservation_reason}; leave --verify out. `upcycled-moe verify` shows how far they are apart."
        )


def _check_not_dense(out: Path) -> None:
    """Check that `out`, given alone, is not a checkpoint that was meant as DENSE: it would be replaced."""
    from ..common.streaming.stored import SourceError, read_config

    try:
        model_type = read_config(str(out), out).get("model_type")
    except SourceError:
        return  # the conversion will say whether what is there may be replaced
    # By its type and not by its provenance, which a merged or an exported checkpoint has too.
    if model_type != "upcycled_qwen_moe":
        raise SettingsError(
            f"{out}: holds a {model_type} checkpoint, and a single argument is OUT, which would be replaced; give "
            "another folder, or DENSE and OUT."
        )


def print_result(result: "ConversionResult") -> None:
    """Print what was written and what the fresh routers do."""
    from ..common.numbers import format_bytes, format_count
    from .console import results_table, stdout_console

    console, plan = stdout_console(), result.plan
    if result.routers is not None:
        experts = plan.config.num_routed_experts
        columns = ("Layer", "Logit std", "Entropy", "Least load", "Most load", "Dead experts")
        title = f"Fresh routers on {plan.recipe.num_calibrated_tokens:,} tokens"
        table = results_table(title, *columns, numbers=columns)
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
