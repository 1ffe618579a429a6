"""`upcycled-moe analyze`: what do the routers and experts of checkpoints do?"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..analysis.settings import AnalysisSettings
from .text_options import PASS_MEMORY_ADVICE, add_pass_options, add_text_options


if TYPE_CHECKING:
    from rich.table import Table

    from ..analysis.results import AnalysisReport

MEMORY_ADVICE = PASS_MEMORY_ADVICE
DEFAULTS = {setting.name: setting.default for setting in fields(AnalysisSettings)}


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "analyze",
        usage="%(prog)s CKPT [CKPT ...] --data TEXT [TEXT ...] --output OUT [options]",
        help="see what routers and experts do",
        description="What do the routers and experts of Mixture-of-Experts checkpoints do with labelled text? For "
        "upcycled ones and stock Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE ones, several side by side. OUT gets "
        "report.html, pictures, and report.json. A checkpoint's own code runs if it lies in a local folder, else only "
        "with --trust-remote-code.",
    )
    parser.add_argument(
        "checkpoints",
        metavar="CKPT",
        nargs="+",
        help="checkpoint: folder or Hub id, or id@revision; NAME=CKPT names it in the report",
    )
    parser.add_argument("--output", metavar="OUT", required=True, help="folder to write the report to")
    parser.add_argument("--overwrite", action="store_true", help="replace the report in OUT if there is one")
    parser.add_argument(
        "--parent",
        metavar="DENSE",
        help="dense checkpoint that the experts were copied from, folder or Hub id (default: the one that "
        "upcycling.json names, if it is a folder here)",
    )
    parser.add_argument("--json", action="store_true", help="print the means over layers as JSON")
    add_text_options(parser.add_argument_group("text"))
    running = parser.add_argument_group("running")
    add_pass_options(running)
    running.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a CKPT that is not a local folder"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    settings = AnalysisSettings(**{name: getattr(options, name) for name in DEFAULTS})

    from ..analysis.output import write_analysis
    from .console import ConsoleProgress, quiet_libraries

    quiet_libraries()
    report = write_analysis(
        options.checkpoints, settings, options.output, overwrite=options.overwrite, progress=ConsoleProgress()
    )
    if options.json:
        print(json.dumps(summarize(report), indent=2))
    else:
        print_analysis(report, options.output)
    return 0


def summarize(report: "AnalysisReport") -> dict[str, Any]:
    """Return the means over layers of each figure by checkpoint, and what was looked at; it fits in JSON."""
    return {
        "domains": report.domains,
        "checkpoints": {
            checkpoint.name: {
                "path": checkpoint.path,
                "parent": checkpoint.parent,
                "num_tokens": checkpoint.num_tokens,
                "figures": {
                    f"{measure}.{name}": result.mean(name)
                    for measure, result in checkpoint.measures.items()
                    for name in result.per_layer
                },
                "notes": [note for result in checkpoint.measures.values() for note in result.notes],
            }
            for checkpoint in report.checkpoints
        },
        "comparisons": [
            {"first": one.first, "second": one.second, "figures": {name: one.mean(name) for name in one.per_layer}}
            for one in report.comparisons
        ],
        "notes": [*report.notes, *report.comparison_notes],
    }


def print_analysis(report: "AnalysisReport", out: str) -> None:
    """Print the means over layers, a row a figure and a column a checkpoint, all notes, and where the report is."""
    from ..analysis.report.write import PAGE_FILE
    from .console import stdout_console

    tables = [_summary_table(report)] + ([_comparison_table(report)] if report.comparisons else [])
    console = stdout_console(*tables)
    for number, table in enumerate(tables):
        if number:
            console.print()
        console.print(table)
    for line in (*_notes(report), f"Wrote {out}; look at {Path(out, PAGE_FILE)}."):
        console.print(line, soft_wrap=True, markup=False)


def _summary_table(report: "AnalysisReport") -> "Table":
    from rich.markup import escape

    from ..analysis.report.summary import summary
    from .console import results_table

    totals = [sum(checkpoint.num_tokens.values()) for checkpoint in report.checkpoints]
    is_same = len(set(totals)) == 1
    tokens = f"{totals[0]:,} tokens" if is_same else "text"
    title = f"Means over layers ({tokens} of {len(report.domains)} domain{'s' * (len(report.domains) > 1)})"
    names = [escape(checkpoint.name) for checkpoint in report.checkpoints]
    table = results_table(title, "Figure", *names, numbers=names)
    if not is_same:
        table.add_row("Tokens", *(f"{total:,}" for total in totals))
    for row in summary(report):
        table.add_row(row.figure.title, *map(_number, row.values))
    return table


def _comparison_table(report: "AnalysisReport") -> "Table":
    """Return a table with a row a pair: there are many more of them than figures."""
    from rich.markup import escape

    from ..analysis.saturation import FIGURES
    from .console import results_table

    titles = [figure.title for figure in FIGURES]
    table = results_table("In common", "Checkpoints", *titles, numbers=titles)
    for one in report.comparisons:
        table.add_row(escape(f"{one.first}, {one.second}"), *(_number(one.mean(figure.name)) for figure in FIGURES))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _notes(report: "AnalysisReport") -> Iterator[str]:
    """Yield what a reader of the tables must know."""
    from ..analysis.report.summary import grouped_notes

    yield from report.comparison_notes
    for one in report.checkpoints:
        if one.parent is not None:
            yield f"The experts of {one.name} are compared with those of {one.parent}."
    for measure in dict.fromkeys(name for one in report.checkpoints for name in one.measures):
        for note, names in grouped_notes(report, measure):
            yield f"{', '.join(names)}: {note}" if names else note
    yield from report.notes
