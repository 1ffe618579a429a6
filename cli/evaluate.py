"""`upcycled-moe evaluate`: what are checkpoints worth, on benchmark tasks and in perplexity?"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.checkpoint_names import name_checkpoints
from ..common.output_folder import FolderKind, check_output_folder, staged
from ..common.settings import SettingsError
from ..common.text_settings import DTYPES, MAX_BLOCK_SIZE
from ..evaluation.settings import AUTO, EvaluationSettings
from ..evaluation.tasks import PAPER_GROUP


if TYPE_CHECKING:
    from ..evaluation.results import EvaluationReport

MEMORY_ADVICE = "lower --batch-size, --block-size or --dtype"
RESULTS_FILE = "results.json"
EVALUATION = FolderKind("evaluation", (RESULTS_FILE,), contents=frozenset({RESULTS_FILE}))


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "evaluate",
        usage="%(prog)s CKPT [CKPT ...] [options]",
        help="score checkpoints on benchmark tasks, and measure perplexity",
        description="Score language models, dense or MoE, side by side: on tasks of lm-evaluation-harness, by default "
        "the ten of the Router Upcycling paper, and in perplexity by domain. One model is in memory at a time.",
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CKPT",
        help="checkpoint: folder, or Hub id (org/name@revision); NAME=CKPT to call it so",
    )
    add_task_options(parser.add_argument_group("tasks"))
    add_text_options(parser.add_argument_group("perplexity"))
    parser.add_argument(
        "--batch-size",
        type=_batch_size,
        default=EvaluationSettings.batch_size,
        metavar="N",
        help=f"prompts or blocks in a forward pass; {AUTO} tries what fits into memory for prompts "
        "(default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=EvaluationSettings.dtype, help="compute in (default: auto)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code of a Hub checkpoint")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"write {RESULTS_FILE} there")
    parser.add_argument("--overwrite", action="store_true", help="replace an evaluation in FOLDER")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_task_options(group: argparse._ArgumentGroup) -> None:
    """Add what says which tasks."""
    group.add_argument(
        "--tasks",
        metavar="NAMES",
        help=f"names in lm-evaluation-harness, commas between (default: {PAPER_GROUP}, the paper's ten; none with "
        "--perplexity-data alone)",
    )
    group.add_argument(
        "--offline-data", type=Path, metavar="FOLDER", help="read the paper's tasks from parquet files, not the Hub"
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task, for a quick look")


def add_text_options(group: argparse._ArgumentGroup) -> None:
    """Add what says which text."""
    defaults = EvaluationSettings
    group.add_argument(
        "--perplexity-data", nargs="+", default=(), metavar="TEXT", help="files, folders, globs or Hub datasets"
    )
    group.add_argument("--split", default=defaults.split, help="of folders and Hub datasets (default: %(default)s)")
    group.add_argument("--text-column", default=defaults.text_column, help="column of the text (default: %(default)s)")
    group.add_argument(
        "--domain-column", help="column of the domain (default: domain if there is one, else folder or file say it)"
    )
    group.add_argument(
        "--tokens-per-domain",
        type=int,
        default=defaults.tokens_per_domain,
        metavar="N",
        help="read so many tokens of each (default: %(default)s)",
    )
    group.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help=f"tokens that a model sees at once (default: {MAX_BLOCK_SIZE}, or the fewest positions of a model)",
    )


def _batch_size(text: str) -> int | str:
    if text != AUTO and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {AUTO}")
    return text if text == AUTO else int(text)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    settings = settings_from(options)
    checkpoints = name_checkpoints(options.checkpoints)
    if options.output is not None:
        kept = [Path(checkpoint.path) for checkpoint in checkpoints]
        check_output_folder(options.output, 0, kept, options.overwrite, EVALUATION)
    elif options.overwrite:
        raise SettingsError("--overwrite goes with --output.")
    if not sys.stderr.isatty():
        # For a bar of the harness that nothing else turns off; tqdm reads this when it is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")

    from ..evaluation.evaluate import evaluate
    from .console import ConsoleProgress, quiet_libraries

    quiet_libraries()
    reports: list[EvaluationReport] = []
    try:
        evaluate(checkpoints, settings, ConsoleProgress(), keep=reports.append)
    finally:
        # What stops a later checkpoint, even an interruption, does not lose what the earlier ones took hours for.
        if reports:
            _deliver(reports[-1], options)
    return 0


def _deliver(report: "EvaluationReport", options: argparse.Namespace) -> None:
    """Print the report, and write it if asked to; neither waits for the other to work."""
    from .evaluation_tables import print_report

    content = json.dumps(report.to_dict(), indent=2, allow_nan=False)
    try:
        if options.json:
            print(content)
        else:
            print_report(report)
    finally:
        if options.output is not None:
            with staged(options.output, options.overwrite, EVALUATION) as folder:
                (folder / RESULTS_FILE).write_text(content + "\n", encoding="utf-8")


def settings_from(options: argparse.Namespace) -> EvaluationSettings:
    """Return the settings that the options say.

    Raises:
        SettingsError: if they contradict each other.
    """
    needs_default = options.tasks is None and (options.offline_data is not None or not options.perplexity_data)
    names = PAPER_GROUP if needs_default else options.tasks or ""
    tasks = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if options.tasks is not None and not tasks:
        raise SettingsError(f"--tasks {options.tasks!r}: names no task.")
    given = vars(options)
    same = {name: given[name] for name in EvaluationSettings.__dataclass_fields__ if name in given and name != "tasks"}
    return EvaluationSettings(tasks=tasks, **same)
