"""Command-line options of a recipe: one for each of its settings, named and explained as there."""

import argparse
import dataclasses
import typing
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..common.settings import SettingsError, load_yaml
from ..conversion.recipe import ConversionRecipe, allowed_types, build_recipe, packaged_recipes


if TYPE_CHECKING:
    from ..conversion.source import DenseSource

CALIBRATION_MEMORY_ADVICE = "lower --calibration-batch-size or --calibration-tokens"
# The sections of `--help` by the setting that each begins with, in the order of the recipe.
SECTIONS = {
    "model": "the dense checkpoint",
    "num_experts": "layers and experts",
    "router": "routers",
    "norm_topk_prob": "selection of experts",
    "router_aux_loss_coef": "losses in training",
    "calibration_data": "calibration text",
    "max_shard_size": "output",
}


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add `--recipe` and an option for each setting to `parser`."""
    section = parser.add_argument_group(
        "recipe", "The options below hold the same settings; they win over the recipe, the recipe over the defaults."
    )
    section.add_argument(
        "--recipe",
        metavar="FILE|NAME",
        help="YAML file with settings, or the name of one that comes with the package (such as "
        "router_upcycling_8x0.5b; an unknown name, such as `all`, lists them)",
    )
    for setting in dataclasses.fields(ConversionRecipe):
        if setting.name in SECTIONS:
            section = parser.add_argument_group(SECTIONS[setting.name])
        section.add_argument(
            "--" + setting.name.replace("_", "-"),
            dest=setting.name,
            # Absent unless given: what is not given comes from the recipe file or the defaults.
            default=argparse.SUPPRESS,
            help=_help(setting),
            **_parsing(setting.type),
        )


def add_places(parser: argparse.ArgumentParser, dense_help: str, out_help: str) -> None:
    """Add DENSE and OUT, both optional: which of them is given, the command decides from `options.places`."""
    parser.add_argument("dense", metavar="DENSE", nargs="?", help=dense_help)
    parser.add_argument("out", metavar="OUT", nargs="?", help=out_help)
    parser.set_defaults(places=[])


def recipe_from(options: argparse.Namespace, dense: str | None) -> ConversionRecipe:
    """Return the recipe that the parsed `options` ask for; it names a model.

    Args:
        dense: the checkpoint that the command line names beside the options, if it does.

    Raises:
        SettingsError: if file and flags do not make a recipe, or name no model or two.
    """
    names = [setting.name for setting in dataclasses.fields(ConversionRecipe)]
    flags = {name: getattr(options, name) for name in names if hasattr(options, name)}
    if dense is not None:
        if "model" in flags:
            raise SettingsError(f"DENSE={dense} and --model={flags['model']} both name the dense model; give one.")
        flags["model"] = dense
    layers = [(options.recipe, load_yaml(find_recipe(options.recipe)))] if options.recipe is not None else []
    recipe = build_recipe(*layers, ("command line", flags))
    if recipe.model is None:
        reason = f"{options.recipe} names none" if options.recipe is not None else "there is no recipe that names one"
        raise SettingsError(f"the dense checkpoint is missing: {reason}; give DENSE before OUT, or --model.")
    return recipe


def open_model(recipe: ConversionRecipe, *, weights: bool) -> tuple["DenseSource", ConversionRecipe]:
    """Return the dense checkpoint of `recipe`, and the recipe with the commit that it was found at.

    The plan adds those of `expert_sources`, so that the recipe that a conversion records opens the same checkpoints
    again. (It does not pin a Hub dataset.) See `open_source` for `weights`.
    """
    from ..conversion.source import open_source

    source = open_source(recipe.model, recipe.revision, weights=weights)
    return source, dataclasses.replace(recipe, revision=source.revision)


def find_recipe(name: str) -> Path:
    """Return the recipe file `name`, or the one of that name that comes with the package.

    Raises:
        SettingsError: if there is neither; it names those that there are.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = packaged_recipes()
    if name in packaged:
        return packaged[name]
    stem = Path(name).name.removesuffix(".yaml")
    similar = get_close_matches(stem, packaged, n=3)
    hint = f"did you mean {' or '.join(similar)}?" if similar else f"packaged recipes: {', '.join(packaged)}."
    raise SettingsError(f"--recipe {name!r}: no such file, and no recipe of that name comes with the package; {hint}")


def _parsing(annotation: Any) -> dict[str, Any]:
    annotation, *others = allowed_types(annotation)
    words = [word for other in others if typing.get_origin(other) is Literal for word in typing.get_args(other)]
    if words:
        return {"type": _number_or_word, "metavar": "|".join(["NUMBER", *words])}
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(annotation) is Literal:
        return {"choices": typing.get_args(annotation)}
    if typing.get_origin(annotation) is list:
        return {"nargs": "+", "type": typing.get_args(annotation)[0], "metavar": "VALUE"}
    return {"type": annotation, "metavar": annotation.__name__.upper()}


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text  # the recipe knows which words are allowed


def _help(setting: dataclasses.Field) -> str:
    text = setting.metadata["help"].replace("%", "%%")
    if setting.default in (None, dataclasses.MISSING) or "(default" in text:
        return text
    return f"{text} (default: {setting.default})"
