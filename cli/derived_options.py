"""Flags of the commands that make a checkpoint of an upcycled one: `export`, `merge` and `prune`."""

import argparse

from ..common.settings import MAX_SHARD_SIZE, parse_size


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add what is read and what is written."""
    parser.add_argument("checkpoint", metavar="CKPT", help="upcycled checkpoint: folder or Hub id")
    parser.add_argument(
        "out", metavar="OUT", type=_folder, help="folder to write; it appears only when all is written"
    )


def _folder(name: str) -> str:
    if not name:
        raise argparse.ArgumentTypeError("empty, which would be the folder that you are in; give a folder.")
    return name


def add_output_options(parser: argparse.ArgumentParser, dry_run: str = "say what would be written") -> None:
    """Add how OUT is written; `dry_run` is what is shown instead."""
    parser.add_argument("--revision", help="branch, tag or commit of CKPT on the Hub")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default=MAX_SHARD_SIZE, help="of a weight file (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--dry-run", action="store_true", help=f"{dry_run} and write nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")


def max_shard_bytes(options: argparse.Namespace) -> int:
    """Return the bytes that a weight file may have.

    Raises:
        SettingsError: if the flag is no size.
    """
    return parse_size("max_shard_size", options.max_shard_size)
