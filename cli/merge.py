"""`upcycled-moe merge`: an upcycled checkpoint becomes a dense one again, or several checkpoints one."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.settings import SettingsError
from ..common.text_settings import CALIBRATION_SPLIT
from ..merging.settings import CHECKPOINT_METHODS, METHODS, MergeSettings
from .derived_options import add_output_options, add_places, max_shard_bytes
from .learn_options import add_learn_options, learn_settings
from .text_options import DEFAULTS, add_pass_options, add_text_options, text_settings


MEMORY_ADVICE = (
    "for usage, lower --batch-size, or give --dtype bfloat16; to learn, lower --step-batch-size, or give "
    "--gradient-checkpointing; and give shorter text or pairs"
)


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "merge",
        usage="%(prog)s CKPT OUT [options]",
        help="merge experts back into a dense checkpoint, or whole checkpoints into one",
        description="Merge the experts of each layer of an upcycled checkpoint into one FFN, and write a dense Qwen "
        "checkpoint, which needs no code of its own. Experts that are still copies give the dense model back, to the "
        "bit; others an approximation. --with merges whole checkpoints instead.",
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
    parser.add_argument(
        "--with",
        dest="others",
        metavar="CKPT",
        nargs="+",
        default=[],
        help="merge CKPT with these whole checkpoints of its architecture, dense or upcycled, instead of its experts; "
        f"for --method {', '.join(CHECKPOINT_METHODS)}",
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

    from .console import ConsoleProgress, quiet_libraries

    if options.dry_run and options.save_coefficients is not None:
        raise SettingsError("--dry-run writes nothing; leave --save-coefficients out, or give --json to see them.")
    shard_bytes, out = max_shard_bytes(options), Path(options.out)
    quiet_libraries()
    progress = ConsoleProgress()
    places = {"save_coefficients": options.save_coefficients, "overwrite": options.overwrite}
    source, make_plan, write, show = (_checkpoints if options.others else _experts)(options)
    plan = make_plan(source, settings, out, shard_bytes, **places, learn=not options.dry_run, progress=progress)
    if not options.dry_run:
        write(plan, out, **places, progress=progress)
    if options.json:
        print(json.dumps(plan.to_dict(), indent=2))
    else:
        show(plan, out, options.dry_run)
    return 0


def _experts(options: argparse.Namespace) -> tuple[Any, Callable, Callable, Callable]:
    """Return the checkpoint whose experts are merged, and what plans, writes and shows that."""
    from ..common.moe_source import open_moe
    from ..merging.merge import merge, plan_merge
    from .merge_results import print_plan

    return open_moe(options.checkpoint, options.revision), plan_merge, merge, print_plan


def _checkpoints(options: argparse.Namespace) -> tuple[Any, Callable, Callable, Callable]:
    """Return the checkpoints that are merged, and what plans, writes and shows that."""
    if options.revision is not None:
        raise SettingsError("--revision has no meaning with --with; give a folder of that revision, and leave it out.")

    from ..common.learned_merge.checkpoints import open_checkpoints
    from ..merging.whole import merge_whole, plan_whole
    from .merge_results import print_whole_plan

    return open_checkpoints([options.checkpoint, *options.others]), plan_whole, merge_whole, print_whole_plan


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
    is_measured = options.method == "usage" and text.data
    return MergeSettings(options.method, options.coefficients, text if is_measured else None, learn)
