"""`upcycled-moe prune`: a checkpoint with fewer experts, and what that costs."""

import argparse
import json
from typing import TYPE_CHECKING

from ..common.text_settings import CALIBRATION_SPLIT
from ..pruning.settings import EVALUATION_SPLIT, METHODS, PruneSettings
from .derived_options import add_output_options, add_places, max_shard_bytes
from .text_options import PASS_MEMORY_ADVICE, add_pass_options, add_text_options, text_settings


if TYPE_CHECKING:
    from rich.table import Table

    from ..pruning.results import PruneResult

MEMORY_ADVICE = PASS_MEMORY_ADVICE


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "prune",
        usage="%(prog)s CKPT OUT --num-experts N --data TEXT [TEXT ...] [options]",
        help="keep fewer experts, or merge them",
        description="Write a checkpoint with N experts in every MoE layer: the best by the method, on the text. Then "
        "say what that costs: the loss before and after, on other text.",
    )
    add_places(parser)
    parser.add_argument("--num-experts", metavar="N", type=int, required=True, help="experts that a layer keeps")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="reap",
        help="what they are kept by: "
        + "; ".join(f"{name}: {what}" for name, what in METHODS.items())
        + " (default: %(default)s)",
    )
    parser.add_argument(
        "--num-experts-per-tok", metavar="K", type=int, help="experts of a token from now on (default: as before)"
    )
    add_output_options(parser, dry_run="show which experts would be kept")
    add_text_options(parser.add_argument_group("text that the scores come from"))
    parser.set_defaults(split=CALIBRATION_SPLIT)
    section = parser.add_argument_group("text that the loss is measured on")
    section.add_argument(
        "--eval-data", metavar="TEXT", nargs="+", default=[], help="as --data (default: the same sources)"
    )
    section.add_argument(
        "--eval-split",
        metavar="SPLIT",
        default=EVALUATION_SPLIT,
        help="of folders and Hub datasets (default: %(default)s)",
    )
    add_pass_options(parser.add_argument_group("running"))
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    settings = PruneSettings(
        method=options.method,
        num_experts=options.num_experts,
        calibration=text_settings(options),
        max_shard_bytes=max_shard_bytes(options),
        num_experts_per_tok=options.num_experts_per_tok,
        evaluation_data=options.eval_data,
        evaluation_split=options.eval_split,
    )

    from ..common.moe_source import open_moe
    from ..pruning.prune import prune
    from .console import ConsoleProgress, quiet_libraries

    quiet_libraries()
    result = prune(
        open_moe(options.checkpoint, options.revision),
        settings,
        options.out,
        overwrite=options.overwrite,
        dry_run=options.dry_run,
        progress=ConsoleProgress(),
    )
    if options.json:
        print(json.dumps(result.to_dict(), indent=2, allow_nan=False))
    else:
        print_result(result)
    return 0


def print_result(result: "PruneResult") -> None:
    """Print which experts are kept, what that costs, and what was written."""
    from ..common.numbers import format_bytes, format_count
    from .console import stdout_console

    tables = [_layers_table(result)] + ([_losses_table(result)] if result.before is not None else [])
    console = stdout_console(*tables)
    for number, table in enumerate(tables):
        if number:
            console.print()
        console.print(table)
    size = f"{format_bytes(result.num_bytes)}, {format_count(result.total_parameters)} parameters"
    last = f"Would write {size}." if result.folder is None else f"Wrote {result.folder}: {size}."
    for line in (*result.notes, last):
        console.print(line, soft_wrap=True, markup=False)


def _layers_table(result: "PruneResult") -> "Table":
    """Return a row a layer; a group of merged experts is joined by plus signs, the one that stays first."""
    from .console import results_table

    numbers = ("Layer", "Kept score")
    kept = "Experts" if result.layers[0].groups is None else "Experts, and those merged into them"
    table = results_table(f"Kept by {result.settings['method']}", "Layer", "Kept score", kept, numbers=numbers)
    for layer in result.layers:
        total = sum(layer.scores)
        share = sum(layer.scores[expert] for expert in layer.kept) / total if total else 0.0
        groups = layer.groups or [[expert] for expert in layer.kept]
        table.add_row(str(layer.index), f"{share:.1%}", " ".join("+".join(map(str, group)) for group in groups))
    return table


def _losses_table(result: "PruneResult") -> "Table":
    from rich.markup import escape

    from .console import results_table

    before, after = result.before, result.after
    columns = ("Tokens", "Loss before", "Loss after", "Perplexity before", "Perplexity after")
    table = results_table("Loss", "Domain", *columns, numbers=columns)
    rows = [*((escape(name), loss, after and after.domains[name]) for name, loss in before.domains.items())]
    for name, first, second in (*rows, ("all", before.overall, after and after.overall)):
        table.add_row(
            name,
            f"{first.num_tokens:,}",
            f"{first.loss:.4f}",
            "" if second is None else f"{second.loss:.4f}",
            f"{first.perplexity:.2f}",
            "" if second is None else f"{second.perplexity:.2f}",
        )
    return table
