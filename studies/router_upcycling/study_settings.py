"""What a study compares, from its configuration file; an unknown key or an impossible value is an error."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intervals import MAX_SEEDS

from upcycled_moe.analysis.settings import AnalysisSettings
from upcycled_moe.common.settings import SettingsError, check_keys, load_yaml
from upcycled_moe.conversion.recipe import ConversionRecipe, build_recipe, packaged_recipes


# The study gives these itself: text is the same for all, and seeds make pairs.
SET_BY_STUDY = (
    *("model_name_or_path", "output_dir", "train_data", "eval_data", "seed", "data_seed", "domain_weights"),
    *("streaming", "resume_from_checkpoint"),
)


# What a method may train with that others do not: nothing that changes how much it sees, or how it is judged.
OF_A_METHOD = (
    *("learning_rate", "router_learning_rate", "warmup_steps", "router_warmup_steps", "weight_decay"),
    *("max_grad_norm", "lr_scheduler_type"),
)


# What the results call the text of all domains together.
ALL_DOMAINS = "all"
# Names become those of folders and files.
NAME = r"\w[\w.-]*"


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """The text of a study.

    Args:
        domains: names; `DOMAIN_train.parquet` and `DOMAIN_validation.parquet` lie in the data folder.
        passage_characters: length of the passages that documents are cut into, so that a batch has many of them.
        parent_characters: of each domain for the parents and the tokenizer.
        upcycling_characters: of each domain for what comes after; other passages.
        validation_characters: of each domain.
        vocab_size: of the tokenizer.
    """

    domains: list[str]
    passage_characters: int
    parent_characters: int
    upcycling_characters: int
    validation_characters: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the comparison.

    Args:
        title: what the report calls it.
        parents: names of the parents that it is tried with.
        recipe: name of a packaged recipe; None trains the dense parent on.
        settings: what differs from that recipe.
        fold_routers: whether the routers are folded into linear ones before training.
        training: what differs from the training of all methods.
    """

    title: str
    parents: list[str]
    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    fold_routers: bool = False
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """All settings of a study.

    Args:
        title: of the report.
        text: see [`TextSettings`].
        model: fields of `Qwen2Config` that all parents share.
        parents: by name, the fields in which each parent differs.
        parent_training: settings of `train.py` for the parents.
        recipe: settings of a conversion that all methods share; they come before those of the methods' own recipes.
        training: settings of `train.py` for all methods.
        methods: by name.
        baseline: the method that the others are compared with.
        primary_comparisons: pairs of methods that the study is about, named before it runs: their p-values are
            corrected for how many there are.
        comparisons: further pairs of methods that are compared with each other.
        seeds: each draws the routers that are random, and the order of the text.
        analysis: settings of the analysis of each trained model.
        keep_checkpoints: whether trained models stay when they have been analysed.
    """

    title: str
    text: TextSettings
    model: dict[str, Any]
    parents: dict[str, dict[str, Any]]
    parent_training: dict[str, Any]
    recipe: dict[str, Any]
    training: dict[str, Any]
    methods: dict[str, Method]
    baseline: str
    seeds: list[int]
    analysis: dict[str, Any]
    primary_comparisons: list[list[str]] = field(default_factory=list)
    comparisons: list[list[str]] = field(default_factory=list)
    keep_checkpoints: bool = False

    def methods_of(self, parent: str) -> dict[str, Method]:
        """Return the methods that are tried with `parent`."""
        return {name: method for name, method in self.methods.items() if parent in method.parents}

    def recipe_of(self, method: Method, **given: Any) -> ConversionRecipe:
        """Return the recipe of `method`, with `given` settings that all methods share.

        Raises:
            SettingsError: if it has an unknown key, or settings that do not go together.
        """
        # Model and text are those of the study.
        packaged = {
            name: value
            for name, value in load_yaml(packaged_recipes()[method.recipe]).items()
            if name != "model" and not name.startswith("calibration_")
        }
        return build_recipe(
            ("recipe", {**self.recipe, **given}), (method.recipe, packaged), (method.title, method.settings)
        )


def load_study(path: str | Path) -> StudySettings:
    """Return the study that the YAML file `path` describes.

    Raises:
        SettingsError: at the first key or value that is wrong.
    """
    study = _build(StudySettings, load_yaml(path), str(path))
    study = dataclasses.replace(
        study,
        text=_build(TextSettings, study.text, f"{path}: text"),
        methods={
            name: _build(Method, settings, f"{path}: methods.{name}") for name, settings in study.methods.items()
        },
    )
    _check_names(study, str(path))
    _check_numbers(study, str(path))
    _check_analysis(study.analysis, f"{path}: analysis")
    for name, method in study.methods.items():
        if method.recipe is not None:
            try:
                study.recipe_of(method, calibration_data=["text"])
            except SettingsError as error:
                raise SettingsError(f"{path}: methods.{name}: {error}") from error
    return study


def _build(kind: type, settings: Any, where: str) -> Any:
    """Return the `kind` of settings, after checking keys and the plain types of values."""
    if not isinstance(settings, Mapping):
        raise SettingsError(f"{where}: expected keys and values, got {settings!r}.")
    known = {setting.name: setting for setting in dataclasses.fields(kind)}
    check_keys(settings, known, where)
    for name, setting in known.items():
        if name not in settings:
            if setting.default is dataclasses.MISSING and setting.default_factory is dataclasses.MISSING:
                raise SettingsError(f"{where}: {name} is missing.")
            continue
        if not isinstance(settings[name], _plain_type(setting.type)):
            raise SettingsError(f"{where}: {name}={settings[name]!r} has the wrong type.")
    return kind(**settings)


def _plain_type(annotation: Any) -> Any:
    """Return what `isinstance` takes for the annotation of a field."""
    if annotation is TextSettings:
        return Mapping
    return getattr(annotation, "__origin__", annotation)


def _check_names(study: StudySettings, path: str) -> None:
    _check_plain_names(study.parents, f"{path}: parents")
    _check_plain_names(study.methods, f"{path}: methods")
    _check_plain_names(study.text.domains, f"{path}: text.domains")
    check_keys({study.baseline: None}, study.methods, f"{path}: baseline")
    _check_pairs(study, path)
    for name, method in study.methods.items():
        if not method.parents:
            raise SettingsError(f"{path}: methods.{name}.parents is empty; name at least one.")
        check_keys(dict.fromkeys(method.parents), study.parents, f"{path}: methods.{name}.parents")
        if method.recipe is not None:
            check_keys({method.recipe: None}, packaged_recipes(), f"{path}: methods.{name}.recipe")
        elif method.settings or method.fold_routers:
            raise SettingsError(f"{path}: methods.{name}: settings and fold_routers need a recipe; name one.")
    for parent in study.parents:
        if study.baseline not in study.methods_of(parent):
            raise SettingsError(
                f"{path}: parent {parent!r} is without the baseline {study.baseline!r}; add it to the baseline's "
                "parents."
            )
    sections = {"training": study.training, "parent_training": study.parent_training}
    sections |= {f"methods.{name}.training": method.training for name, method in study.methods.items()}
    for section, settings in sections.items():
        for name in settings:
            if name in SET_BY_STUDY:
                raise SettingsError(f"{path}: {section}.{name} is set by the study itself; leave it out.")
            if section.startswith("methods.") and name not in OF_A_METHOD:
                raise SettingsError(
                    f"{path}: {section}.{name} must be the same for all methods; set it in training. A method may set "
                    f"{', '.join(OF_A_METHOD)}."
                )


def _check_plain_names(names: Iterable[Any], where: str) -> None:
    names = list(names)
    if not names:
        raise SettingsError(f"{where} is empty; name at least one.")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise SettingsError(f"{where}: {name!r} is no name; use letters, digits, '_', '-' and '.'.")
    if len(set(names)) != len(names):
        raise SettingsError(f"{where}: {', '.join(names)}: each may be there once.")


def _check_pairs(study: StudySettings, path: str) -> None:
    for setting in ("primary_comparisons", "comparisons"):
        for pair in getattr(study, setting):
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
                raise SettingsError(f"{path}: {setting}: {pair!r} is not a pair of methods; write [first, second].")
            check_keys(dict.fromkeys(pair), study.methods, f"{path}: {setting}")
            first, second = (study.methods[name] for name in pair)
            if pair[0] == pair[1] or not set(first.parents) & set(second.parents):
                raise SettingsError(
                    f"{path}: {setting}: {pair!r} compares nothing; name two methods that have a parent in common."
                )


def _check_analysis(settings: Mapping[str, Any], where: str) -> None:
    # Text and parent are those of the study.
    known = {setting.name for setting in dataclasses.fields(AnalysisSettings)} - {"data", "parent"}
    check_keys(settings, known, where)
    try:
        AnalysisSettings(data=["text"], **settings)
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error


def _check_numbers(study: StudySettings, path: str) -> None:
    for setting in dataclasses.fields(TextSettings):
        value = getattr(study.text, setting.name)
        if setting.type is int and value < 1:
            raise SettingsError(f"{path}: text.{setting.name}={value} must be at least 1.")
    if ALL_DOMAINS in study.text.domains:
        raise SettingsError(f"{path}: text.domains: {ALL_DOMAINS!r} is what results call all of them; rename it.")
    if not all(type(seed) is int for seed in study.seeds) or len(set(study.seeds)) != len(study.seeds):
        raise SettingsError(f"{path}: seeds={study.seeds} must be whole numbers, each once.")
    if not 1 <= len(study.seeds) <= MAX_SEEDS:
        raise SettingsError(f"{path}: {len(study.seeds)} seeds are outside 1 to {MAX_SEEDS}.")
