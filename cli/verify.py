"""`upcycled-moe verify`: does a converted checkpoint compute what its dense parent computes?"""

import argparse
import json
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..conversion.verify import VerifyReport

MEMORY_ADVICE = "lower --sequence-length or --dtype"


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "verify",
        usage="%(prog)s DENSE OUT [options]",
        help="compare a checkpoint with its dense parent",
        description="Does OUT compute what its dense parent computes, from the same tokens? OUT is loaded with "
        "its own code: that in a local folder runs as it is, that of a Hub id only with --trust-remote-code. Exit "
        "status 3 if they differ.",
    )
    parser.add_argument("dense", metavar="DENSE", help="dense Qwen checkpoint: folder or Hub id")
    parser.add_argument("moe", metavar="OUT", help="converted checkpoint: folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of DENSE on the Hub")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="compute in")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code of an OUT that is not a local folder"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest |Δlogit| (default: 5e-6 times the largest logit, or 20 times the dense model's own rounding)",
    )
    parser.add_argument("--num-sequences", type=int, default=4, help="random sequences to compare (default: 4)")
    parser.add_argument("--sequence-length", type=int, default=128, help="their length (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sequences (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    import torch

    from ..conversion.source import open_source
    from ..conversion.verify import verify
    from .console import quiet_libraries

    quiet_libraries()
    report = verify(
        str(open_source(options.dense, options.revision).folder),
        options.moe,
        dtype=getattr(torch, options.dtype),
        tolerance=options.tolerance,
        num_sequences=options.num_sequences,
        sequence_length=options.sequence_length,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_verification(report)
    return 0 if report.equal else 3


def print_verification(report: "VerifyReport") -> None:
    """Print the report for a person."""
    verdict = "Equal" if report.equal else "DIFFERENT tokens" if report.has_equal_logits else "DIFFERENT"
    print(
        f"{verdict}: largest |Δlogit| {report.max_difference:.1e}, "
        f"{report.difference_to_allowed:.2g} of what is allowed there (the dense model's own rounding: up to "
        f"{report.rounding_noise:.1e}, largest logit {report.max_logit:.3g}), same argmax at "
        f"{report.argmax_agreement:.2%} of {report.num_positions} positions, in {report.dtype}."
    )
    if report.tokenizer_difference is not None:
        print(f"The tokenizers differ: with OUT's, {report.tokenizer_difference}.")
    if report.is_limited_by_rounding:
        print(
            f"Where this model rounds most, differences of up to {report.max_allowed:.1e} pass for rounding, and "
            "faults that make no larger ones are not seen."
        )
