"""`upcycled-moe merge`: an upcycled checkpoint becomes a dense one again."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.settings import SettingsError
from ..common.text_settings import CALIBRATION_SPLIT
from ..merging.settings import METHODS, MergeSettings
from .derived_options import add_output_options, add_places, max_shard_bytes
from .learn_options import add_learn_options, learn_settings
from .text_options import DEFAULTS, PASS_MEMORY_ADVICE, add_pass_options, add_text_options, text_settings


if TYPE_CHECKING:
    from rich.table import Table

    from ..merging.coefficients import MergeCoefficients
    from ..merging.merge import MergePlan

MEMORY_ADVICE = PASS_MEMORY_ADVICE


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "merge",
        usage="%(prog)s CKPT OUT [options]",
        help="merge experts back into a dense checkpoint",
        description="Merge the experts of each layer of an upcycled checkpoint into one FFN, and write a dense Qwen "
        "checkpoint, which needs no code of its own. Experts that are still copies give the dense model back, to the "
        "bit; others an approximation.",
    )
    add_places(parser)
    parser.add_argument(
        "--method",
        choices=METHODS,
        default=MergeSettings.method,
        help="average: all experts alike; usage: by the routing weights that they get on the text of --data; "
        "coefficients: those in a file; shared: the shared expert alone; learned: what brings --loss down on --data "
        "(default: %(default)s)",
    )
    parser.add_argument("--coefficients", metavar="FILE", type=Path, help="JSON file, for --method coefficients")
    parser.add_argument(
        "--save-coefficients",
        metavar="FILE",
        type=Path,
        help="write what was used, as --coefficients takes it; with --overwrite over a file of them that is there",
    )
    add_output_options(parser)
    text = parser.add_argument_group("data: text for --method usage; preference pairs, or text, for learned")
    add_text_options(text, required=False)
    parser.set_defaults(split=CALIBRATION_SPLIT)
    add_pass_options(text)
    add_learn_options(parser.add_argument_group("learning, for --method learned"))
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    settings = _settings(options)

    from ..common.moe_source import open_moe
    from ..merging.merge import merge, plan_merge
    from .console import ConsoleProgress, quiet_libraries

    shard_bytes, out = max_shard_bytes(options), Path(options.out)
    if options.dry_run and options.save_coefficients is not None:
        raise SettingsError("--dry-run writes nothing; leave --save-coefficients out, or give --json to see them.")
    quiet_libraries()
    progress = ConsoleProgress()
    source = open_moe(options.checkpoint, options.revision)
    places = {"save_coefficients": options.save_coefficients, "overwrite": options.overwrite}
    plan = plan_merge(source, settings, out, shard_bytes, **places, learn=not options.dry_run, progress=progress)
    if not options.dry_run:
        merge(plan, out, **places, progress=progress)
    if options.json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        print_plan(plan, out, options.dry_run)
    return 0


def _settings(options: argparse.Namespace) -> MergeSettings:
    text, defaults = text_settings(options), DEFAULTS | {"split": CALIBRATION_SPLIT}
    changed = [name for name, default in defaults.items() if name != "data" and getattr(text, name) != default]
    if changed and not text.data:
        raise SettingsError(f"--{changed[0].replace('_', '-')} has no meaning without --data; give both or none.")
    learn = learn_settings(options, text, changed)
    if learn is None and text.data and options.method != "usage":
        raise SettingsError(
            f"--data has no meaning with --method {options.method}, only with usage and learned; leave it out."
        )
    return MergeSettings(
        options.method, options.coefficients, text if options.method == "usage" and text.data else None, learn
    )


def print_plan(plan: "MergePlan", out: Path, dry_run: bool) -> None:
    """Print what was written to `out`, or would be."""
    from ..common.numbers import format_bytes, format_count
    from .console import stdout_console

    table = _table(plan)
    console = stdout_console(table)
    console.print(table)
    for line in _evidence(plan):
        console.print(line, soft_wrap=True, markup=False)
    console.print(
        f"{'Would write' if dry_run else 'Wrote'} {out} ({plan.derived.config.architectures[0]}): "
        f"{format_bytes(plan.derived.num_bytes)}, {format_count(plan.derived.total_parameters)} parameters.",
        soft_wrap=True,
        markup=False,
    )


def _evidence(plan: "MergePlan") -> Iterator[str]:
    """Yield in lines what the coefficients come from."""
    if (num_tokens := plan.chosen.num_tokens) is not None:
        yield f"Measured on {sum(num_tokens.values()):,} tokens of {', '.join(num_tokens)}."
    if (fit := plan.chosen.fit) is not None:
        unit = "blocks" if fit.settings.loss == "lm" else "pairs"
        yield f"Learned in {len(fit.steps):,} steps from {fit.num_train:,} {unit}, by {fit.settings.loss}."
        yield (
            f"Coefficients moved by up to {fit.largest_move:.3f}, and by up to {fit.largest_relative_move:.0%} of "
            "what they were."
        )
        changes = ", ".join(f"{name} {fit.before[name]:.4f} -> {fit.after[name]:.4f}" for name in fit.after)
        yield f"On {fit.num_heldout:,} {unit} that were held out: {changes}."


def _table(plan: "MergePlan") -> "Table":
    """Return a table of the coefficients: a row a layer, or a row a matrix in layers where they differ."""
    from .console import results_table

    shared = plan.coefficients.shared
    num_experts = plan.derived.source.config.num_experts
    columns = ["Least", "Most", f"Entropy (at most {math.log(num_experts):.3f})"] + ["Shared expert"] * bool(shared)
    table = results_table(f"Coefficients: {plan.settings.method}", "Layer", *columns, numbers=columns)
    for layer_idx, name, values in _rows(plan.coefficients):
        entropy = math.fsum(value * math.log(1 / value) for value in values if value > 0)
        figures = [min(values), max(values), entropy] + ([shared[layer_idx]] if shared else [])
        table.add_row(name, *(f"{figure:.3f}" for figure in figures))
    return table


def _rows(coefficients: "MergeCoefficients") -> Iterator[tuple[int, str, tuple[float, ...]]]:
    """Yield the layer, what to call the row, and its coefficients."""
    for layer_idx, matrices in coefficients.layers.items():
        if len(set(matrices.values())) == 1:
            yield layer_idx, str(layer_idx), next(iter(matrices.values()))
        else:
            yield from ((layer_idx, f"{layer_idx} {matrix}", values) for matrix, values in matrices.items())
