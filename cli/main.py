"""Entry point of `upcycled-moe`: parses, dispatches, and turns every failure into one line and an exit status.

Exit status: 0 done; 1 failed at run time; 2 wrong usage, recipe or input; 3 `verify` found a difference;
130 interrupted; 143 terminated. Results go to stdout, progress and messages to stderr.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from . import analyze, card, convert, evaluate, export, merge, overoptimization, plan, prune, push, verify


COMMANDS = (plan, convert, verify, analyze, evaluate, merge, export, prune, overoptimization, card, push)

EPILOG = """\
examples:
  upcycled-moe plan Qwen/Qwen2.5-0.5B --num-experts 8 --router linear
  upcycled-moe convert Qwen/Qwen2.5-0.5B ./moe --num-experts 8 --num-experts-per-tok 2 --calibration-data text.parquet
  upcycled-moe convert ./moe --recipe router_upcycling_8x0.5b
  upcycled-moe verify Qwen/Qwen2.5-0.5B ./moe
  upcycled-moe evaluate Qwen/Qwen2.5-0.5B ./moe --limit 100
  upcycled-moe analyze ./moe ./vanilla --data text/ --output report
  upcycled-moe merge ./moe ./dense --method usage --data text/
  upcycled-moe export ./moe ./native --to auto
  upcycled-moe prune ./moe ./pruned --num-experts 4 --method reap --data text/
  upcycled-moe overoptimization --samples samples.parquet --gold ./gold --reward-models dense=./rm --output held
  upcycled-moe card ./moe --evaluation scores/results.json --analysis report/report.json
  upcycled-moe push ./moe org/name --dry-run
  upcycled-moe plan ./moe --train run.yaml max_steps=1000 --accelerate fsdp2.yaml --gpu h100
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage of forty options above them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="upcycled-moe",
        description="Turn a dense Qwen checkpoint into a Mixture-of-Experts one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        subparser = command.add_parser(commands)
        subparser.allow_abbrev = False
        subparser.set_defaults(run=command.run, parser=subparser, memory_advice=command.MEMORY_ADVICE)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = build_parser()
    options, unknown = parser.parse_known_args(arguments)
    if options.version:
        from importlib.metadata import version

        print(f"upcycled-moe {version('upcycled-moe')}")
        return 0
    if options.command is None:
        parser.print_help()
        return 0
    _settle_places(options, unknown)
    signal.signal(signal.SIGTERM, _terminate)
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    from ..common.settings import SettingsError

    try:
        status = options.run(options)
        # Here, so that a full disk or a closed pipe is still caught.
        sys.stdout.flush()
        return status
    except SettingsError as error:
        return _fail(error, 2)
    except OSError as error:
        _abandon_unprinted()
        if isinstance(error, BrokenPipeError):
            # The reader has seen enough.
            return 128 + signal.SIGPIPE
        reason = error.strerror or str(error)
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{reason}", 1)
    except (MemoryError, RuntimeError) as error:
        # Only what fails for lack of memory: any other one is a bug, and its traceback wanted.
        from ..common.devices import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        return _fail(
            f"out of memory ({reason}); {options.memory_advice}, or set CUDA_VISIBLE_DEVICES= to run on the CPU.", 1
        )
    except KeyboardInterrupt:
        return _fail("interrupted.", 130)


def _abandon_unprinted() -> None:
    """Drop what stdout cannot take, so that it does not fail once more, with a traceback, at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _settle_places(options: argparse.Namespace, left_over: list[str]) -> None:
    """Put DENSE and OUT into `options.places`, for a command that has it, and refuse what else is left over.

    argparse looks for optional places only once, before the first option; later ones are left over.
    """
    flags = [argument for argument in left_over if argument.startswith("-")]
    if hasattr(options, "places"):
        places = [place for place in (options.dense, options.out, *left_over) if place is not None]
        _check_places(options.parser, places)
        options.places, left_over = places[:2], places[2:]
    if flags or left_over:
        _refuse(options.parser, (flags or left_over)[0])


def _check_places(parser: argparse.ArgumentParser, places: list[str]) -> None:
    """Refuse what a mistake turned into DENSE or OUT."""
    for place in places:
        if not place.strip():
            parser.error("DENSE or OUT is empty; was it a variable that is not set?")
        if place.lower() in ("true", "false", "yes", "no"):
            parser.error(
                f"unknown argument {place}; a switch takes no value: write --norm-topk-prob or --no-norm-topk-prob, "
                f"and ./{place} for a folder."
            )


def _terminate(signal_number: int, frame: object) -> None:
    raise SystemExit(128 + signal_number)


def _fail(message: object, status: int) -> int:
    print(f"upcycled-moe: error: {' '.join(str(message).split())}", file=sys.stderr)
    return status


def _refuse(parser: argparse.ArgumentParser, argument: str) -> NoReturn:
    """Exit with status 2 for an argument that `parser` does not know."""
    name = argument.partition("=")[0]
    similar = get_close_matches(name, [option for action in parser._actions for option in action.option_strings], n=1)
    hint = f"; did you mean {similar[0]}?" if similar else f"; see `{parser.prog} --help`."
    parser.error(f"unknown argument {name}{hint}")


if __name__ == "__main__":
    sys.exit(main())
