"""Flags for learning the coefficients of a merge: `LearnSettings`."""

import argparse
from dataclasses import fields

from ..common.settings import SettingsError
from ..common.text_settings import TextSettings
from ..merging.settings import INITIAL, PARTS, SHARED_EXPERT_WEIGHT, LearnSettings
from ..preference.settings import LOSSES, FitSettings, PairSettings


# By flag, the setting of the fit that it is.
_FIT = {
    "learning_rate": "learning_rate",
    "max_steps": "max_steps",
    "step_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "max_length": "max_length",
    "beta": "beta",
    "holdout": "holdout",
    "seed": "seed",
}
_LEARN = ("per", "initial", "shared_expert_weight", "reference")
_FLAGS = ("loss", "max_pairs", *_LEARN, *_FIT)
# Flags about text that say how routers run over it.
_OF_PASS = ("batch_size", "dtype")
# The losses that a flag is about, where these are not all.
_ONLY_FOR = {"max_pairs": ("bradley_terry", "dpo"), "max_length": ("bradley_terry", "dpo"), "beta": ("dpo",)}
# Preference pairs are few, and one set of coefficients for all weights moves with all of them.
_PER_OF_CHECKPOINTS = "model"
_DEFAULTS = {setting.name: setting.default for setting in fields(FitSettings)}


def add_learn_options(section: argparse._ArgumentGroup) -> None:
    """Add what says how coefficients are learned; a flag that is not given is None."""
    section.add_argument(
        "--loss",
        choices=LOSSES,
        help="bradley_terry: of a reward model on preference pairs; dpo: of a language model on preference pairs; lm: "
        "of a language model on text",
    )
    section.add_argument(
        "--per",
        choices=PARTS,
        help="what has coefficients of its own: a layer, a matrix of it for experts, or with --with the whole model "
        f"(default: {LearnSettings.per}, with --with {_PER_OF_CHECKPOINTS})",
    )
    section.add_argument(
        "--initial",
        choices=INITIAL,
        help="start with all experts alike, or by the routing weights that they get on the text of --data "
        f"(default: {LearnSettings.initial})",
    )
    section.add_argument(
        "--shared-expert-weight",
        metavar="LAMBDA",
        type=float,
        help=f"of the shared expert, which is not learned (default: {SHARED_EXPERT_WEIGHT}, as in XFT)",
    )
    section.add_argument(
        "--reference",
        metavar="DENSE",
        help="for dpo, the language model that answers are compared with (default: the merge as it is at first)",
    )
    section.add_argument("--max-pairs", metavar="N", type=int, help="the first pairs of --data (default: all)")
    for flag, kind, text in (
        ("learning_rate", float, "of the logits of the coefficients"),
        ("max_steps", int, "optimizer steps"),
        ("step_batch_size", int, "pairs, or blocks of text, at a time"),
        ("gradient_accumulation_steps", int, "batches in a step"),
        ("max_length", int, "tokens of a prompt and an answer"),
        ("beta", float, "of DPO"),
        ("holdout", float, "share of the data that is not learned from but measured on"),
        ("seed", int, "of the order of the data, and of what is held out"),
    ):
        metavar = "N" if kind is int else "X"
        help_text = f"{text} (default: {_DEFAULTS[_FIT[flag]]})"
        section.add_argument(f"--{flag.replace('_', '-')}", metavar=metavar, type=kind, help=help_text)
    section.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        default=None,
        help="compute activations twice and store fewer",
    )


def learn_settings(options: argparse.Namespace, text: TextSettings, changed: list[str]) -> LearnSettings | None:
    """Return what the flags say, None if they are not about learning.

    Args:
        text: what the flags about text say.
        changed: those of them that are given.

    Raises:
        SettingsError: if a value is not allowed, or a flag has no meaning with the others.
    """
    given = {flag: getattr(options, flag) for flag in _FLAGS if getattr(options, flag) is not None}
    if options.method != "learned":
        if given:
            raise SettingsError(
                f"{_flag(min(given, key=_FLAGS.index))} has no meaning with --method {options.method}, only with "
                "learned; leave it out."
            )
        return None
    if options.loss is None or not text.data:
        missing = "--loss" if options.loss is None else "--data"
        raise SettingsError(f"--method learned needs a loss, and data for it; give {missing}.")
    for flag in given:
        if options.loss not in _ONLY_FOR.get(flag, LOSSES):
            raise SettingsError(
                f"{_flag(flag)} has no meaning with --loss {options.loss}, only with "
                f"{' and '.join(_ONLY_FOR[flag])}; leave it out."
            )
    if unused := [name for name in changed if not _is_used(name, options)]:
        only = "--initial usage" if unused[0] in _OF_PASS else "--loss lm"
        raise SettingsError(f"{_flag(unused[0])} has no meaning here, only with {only}; leave it out.")
    data = text if options.loss == "lm" else PairSettings(text.data, options.split, options.max_pairs)
    fit = FitSettings(options.loss, **{_FIT[flag]: value for flag, value in given.items() if flag in _FIT})
    if options.others:
        given.setdefault("per", _PER_OF_CHECKPOINTS)
    routing = {"routing_batch_size": text.batch_size, "routing_dtype": text.dtype}
    return LearnSettings(data, fit, **routing, **{name: given[name] for name in _LEARN if name in given})


def _is_used(name: str, options: argparse.Namespace) -> bool:
    """Return whether the flag `name` about text says something of what is learned from."""
    if name in _OF_PASS:
        return options.initial == "usage"
    return options.loss == "lm" or name == "split"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
