"""Command-line options of a recipe: one for each of its settings, named and explained as there."""

import argparse
import dataclasses
import typing
from typing import Any, Literal

from ..common.settings import load_yaml
from ..conversion.recipe import ConversionRecipe, allowed_types, build_recipe


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add `--recipe` and an option for each setting to `parser`."""
    group = parser.add_argument_group("recipe", "flags win over the recipe file, the file over the defaults")
    group.add_argument("--recipe", metavar="FILE", help="YAML file with these settings")
    for setting in dataclasses.fields(ConversionRecipe):
        group.add_argument(
            "--" + setting.name.replace("_", "-"),
            dest=setting.name,
            # Absent unless given: what is not given comes from the recipe file or the defaults.
            default=argparse.SUPPRESS,
            help=_help(setting),
            **_parsing(setting.type),
        )


def recipe_from(options: argparse.Namespace) -> ConversionRecipe:
    """Return the recipe that the parsed `options` ask for.

    Raises:
        SettingsError: if file and flags do not make a recipe.
    """
    names = [setting.name for setting in dataclasses.fields(ConversionRecipe)]
    flags = {name: getattr(options, name) for name in names if hasattr(options, name)}
    layers = [(options.recipe, load_yaml(options.recipe))] if options.recipe else []
    return build_recipe(*layers, ("command line", flags))


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
