"""`upcycled-moe overoptimization`: does a reward model hold when it is optimised?"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.checkpoint_names import NamedCheckpoint, name_checkpoints
from ..common.settings import SettingsError
from ..common.text_settings import DTYPES
from ..overoptimization.settings import (
    ENSEMBLE_METHODS,
    OveroptimizationSettings,
    PolicySettings,
    parse_ensemble,
    parse_reward_models,
)


if TYPE_CHECKING:
    from rich.table import Table

    from ..overoptimization.measures import ModelResult
    from ..overoptimization.overoptimize import Measurement
    from ..overoptimization.results import Results

MEMORY_ADVICE = "lower --batch-size or --max-length, or give --dtype bfloat16"


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "overoptimization",
        usage="%(prog)s (--samples TABLE | --policy CKPT --prompts PAIRS) (--gold CKPT | --gold-column NAME) "
        "--reward-models NAME=CKPT [...] --output OUT [options]",
        help="see whether reward models hold when they are optimised",
        description="Best-of-n curves: how good is the response that a reward model likes best of n, to a gold reward "
        "model that it never saw? Where gold falls as n grows, the reward model is over-optimised. Several models are "
        "measured on the same samples. OUT gets scores.parquet, results.json and curves.png; a run that was stopped "
        "goes on, and what is scored once is not scored again.",
    )
    _add_samples(parser.add_argument_group("samples"))
    _add_models(parser.add_argument_group("models"))
    _add_running(parser.add_argument_group("running"))
    parser.add_argument("--output", metavar="OUT", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the results in OUT; scores of the same samples stay"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_samples(group: argparse._ArgumentGroup) -> None:
    defaults = PolicySettings
    group.add_argument(
        "--samples",
        metavar="TABLE",
        type=Path,
        help="parquet or jsonl file with columns prompt (a text or messages) and responses (as many texts each)",
    )
    group.add_argument("--policy", metavar="CKPT", help="language model that answers the prompts: folder or Hub id")
    group.add_argument(
        "--prompts",
        metavar="PAIRS",
        nargs="+",
        help="preference pairs, or files with a column prompt: files, folders, globs or Hub datasets",
    )
    group.add_argument("--split", help=f"of folders and Hub datasets (default: {defaults.split})")
    group.add_argument("--max-prompts", type=int, metavar="N", help="the first N different prompts only")
    group.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        help=f"responses to each prompt, the largest n (default: {defaults.num_samples})",
    )
    group.add_argument("--temperature", type=float, help=f"of the policy (default: {defaults.temperature})")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"where a response is cut (default: {defaults.max_new_tokens})",
    )


def _add_models(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--gold", metavar="CKPT", help="gold reward model: folder or Hub id, or id@revision")
    group.add_argument(
        "--gold-column", metavar="NAME", help="column of TABLE with gold's score of each response, instead of --gold"
    )
    group.add_argument(
        "--reward-models",
        metavar="NAME=CKPT",
        nargs="+",
        required=True,
        help="reward models to optimise; NAME=CKPT,CKPT, or the same NAME again, are seeds of one",
    )
    group.add_argument(
        "--ensemble",
        metavar="NAME=METHOD:MODEL,MODEL",
        action="append",
        default=[],
        help=f"reward model made of others, all their seeds, by {' or '.join(ENSEMBLE_METHODS)} of their standardised "
        "scores; may be given several times",
    )
    group.add_argument("--baseline", metavar="NAME", help="model that others are compared with (default: the first)")


def _add_running(group: argparse._ArgumentGroup) -> None:
    defaults = OveroptimizationSettings
    group.add_argument(
        "--num-resamples",
        type=int,
        default=defaults.num_resamples,
        metavar="N",
        help="of the prompts, for the intervals (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=defaults.seed, help="of the responses and the resamples (default: %(default)s)"
    )
    group.add_argument(
        "--batch-size",
        type=int,
        default=defaults.batch_size,
        metavar="N",
        help="responses in a forward pass (default: %(default)s)",
    )
    group.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="tokens of a conversation, which is cut at its beginning (default: the positions of each model)",
    )
    group.add_argument("--dtype", choices=DTYPES, default=defaults.dtype, help="compute in (default: %(default)s)")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of a CKPT that is not a local folder"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    settings = settings_from(options)

    from ..overoptimization.overoptimize import measure_overoptimization
    from .console import ConsoleProgress, quiet_libraries

    quiet_libraries()
    measurement = measure_overoptimization(
        settings, options.output, overwrite=options.overwrite, progress=ConsoleProgress()
    )
    if options.json:
        print(json.dumps(measurement.to_dict(), indent=2, allow_nan=False))
    else:
        print_measurement(measurement, options.output)
    return 0


def settings_from(options: argparse.Namespace) -> OveroptimizationSettings:
    """Return the settings that the options say.

    Raises:
        SettingsError: if they contradict each other.
    """
    same = ("gold_column", "baseline", "batch_size", "max_length", "dtype", "trust_remote_code", "num_resamples")
    return OveroptimizationSettings(
        samples=_samples(options),
        reward_models=parse_reward_models(options.reward_models),
        gold=_checkpoint(options.gold) if options.gold is not None else None,
        ensembles=[parse_ensemble(argument) for argument in options.ensemble],
        seed=options.seed,
        **{name: getattr(options, name) for name in same},
    )


def _samples(options: argparse.Namespace) -> Path | PolicySettings:
    if (options.samples is None) == (options.policy is None):
        raise SettingsError("Give samples once: --samples with a table, or --policy with --prompts.")
    names = ("prompts", "split", "max_prompts", "num_samples", "temperature", "max_new_tokens")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.samples is None:
        policy, prompts = _checkpoint(options.policy), given.pop("prompts", ())
        return PolicySettings(policy, prompts, seed=options.seed, **given)
    for name in given:
        raise SettingsError(f"--{name.replace('_', '-')} has no meaning with --samples; leave it out.")
    return options.samples


def _checkpoint(argument: str) -> NamedCheckpoint:
    return name_checkpoints([argument])[0]


def print_measurement(measurement: "Measurement", out: Path) -> None:
    """Print a row for each model, what follows, and where everything is."""
    from ..overoptimization.overoptimize import RESULTS_FILE
    from .console import stdout_console

    table = _table(measurement.results)
    console = stdout_console(table)
    console.print(table)
    samples = measurement.facts["samples"]
    for line in (
        f"{samples['num_prompts']:,} prompts, {samples['num_responses']:,} responses to each. Gold is in standard "
        "deviations within prompts, zero is no choice; in brackets are 95 % intervals over prompts.",
        *measurement.results.verdicts(),
        f"Wrote {out}; the numbers are in {out / RESULTS_FILE}.",
    ):
        console.print(line, soft_wrap=True, markup=False)


def _table(results: "Results") -> "Table":
    from rich.markup import escape

    from .console import results_table

    last = results.numbers[-1]
    columns = ["Seeds", "Peak of gold", "at n", f"Gold at n = {last}", "Drop", "Regret", "Proxy − gold", "Accuracy"]
    if any(len(model.seeds) > 1 for model in results.models.values()):
        columns.append("Drop of each seed")
    table = results_table("Best of n", "Model", *columns, numbers=columns)
    for name, model in results.models.items():
        table.add_row(escape(name), *_row(model)[: len(columns)])
    return table


def _row(model: "ModelResult") -> list[str]:
    from rich.markup import escape

    from ..overoptimization.bootstrap import Interval

    figures, accuracy = model.figures, model.figures.pairwise_accuracy
    at_end = Interval(model.gold.low[-1], model.gold.high[-1])
    return [
        str(len(model.seeds)),
        f"{figures.gold_at_peak:+.3f}",
        str(figures.peak),
        escape(f"{figures.gold_at_end:+.3f} {at_end}"),
        escape(f"{figures.drop:.3f} {model.drop_interval}"),
        f"{figures.regret:.3f}",
        f"{figures.goodhart_gap:+.3f}",
        "-" if accuracy is None else f"{accuracy:.1%}",
        " ".join(f"{seed.figures.drop:.3f}" for seed in model.seeds) if len(model.seeds) > 1 else "",
    ]
