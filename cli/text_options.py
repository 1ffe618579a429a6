"""Flags for the text that a checkpoint is looked at with, and for the pass over it: `TextSettings`."""

import argparse
from dataclasses import fields

from ..common.text_settings import DTYPES, MAX_BLOCK_SIZE, TextSettings


DEFAULTS = {setting.name: setting.default for setting in fields(TextSettings)}
PASS_MEMORY_ADVICE = "lower --batch-size or --block-size, or give --dtype bfloat16"


def add_text_options(section: argparse._ArgumentGroup, *, required: bool = True) -> None:
    """Add what says which text; `required` is whether there must be some."""
    section.add_argument(
        "--data",
        metavar="TEXT",
        nargs="+",
        required=required,
        default=None if required else [],
        help="parquet, jsonl and txt files, folders, globs, or Hub datasets; the domain of a text is its column, else "
        "the sub-folder or the file that it lies in",
    )
    section.add_argument(
        "--domain-column", metavar="NAME", help="column that holds the domain (default: domain, where there is one)"
    )
    section.add_argument(
        "--text-column",
        metavar="NAME",
        default=DEFAULTS["text_column"],
        help="column that holds the text (default: %(default)s)",
    )
    section.add_argument(
        "--split", default=DEFAULTS["split"], help="of folders and Hub datasets (default: %(default)s)"
    )
    section.add_argument(
        "--tokens-per-domain",
        metavar="N",
        type=int,
        default=DEFAULTS["tokens_per_domain"],
        help="tokens of each domain to read, the first ones (default: %(default)s)",
    )
    section.add_argument(
        "--block-size",
        metavar="N",
        type=int,
        help=f"tokens that are seen together (default: {MAX_BLOCK_SIZE}, or the fewest positions of a model)",
    )


def add_pass_options(section: argparse._ArgumentGroup) -> None:
    """Add how the model runs over the text."""
    section.add_argument(
        "--batch-size",
        type=int,
        default=DEFAULTS["batch_size"],
        help="blocks at a time; changes no figure (default: %(default)s)",
    )
    section.add_argument(
        "--dtype",
        choices=DTYPES,
        default=DEFAULTS["dtype"],
        help="compute in; auto is that of the weights (default: %(default)s)",
    )


def text_settings(options: argparse.Namespace) -> TextSettings:
    """Return what the flags say.

    Raises:
        SettingsError: if a value is not allowed.
    """
    return TextSettings(**{name: getattr(options, name) for name in DEFAULTS})
