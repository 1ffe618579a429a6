"""What a study of reward hacking does, from its configuration file; an unknown key is an error."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from upcycled_moe.common.settings import SettingsError, check_keys, load_yaml


# The study gives these itself.
SET_BY_STUDY = (
    *("model_name_or_path", "output_dir", "train_data", "eval_data", "seed", "data_seed", "flip_rate", "max_pairs"),
    *("resume_from_checkpoint",),
)
# Names become those of folders.
NAME = r"\w[\w.-]*"


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Dialogues of people, cut into exchanges: what is asked last, and the answer.

    Args:
        sources: names of preference pairs; `NAME_train.parquet` and `NAME_test.parquet` lie in the data folder.
        max_prompt_characters: exchanges with a longer prompt are left out.
        max_answer_characters: those with a longer answer too.
        vocab_size: of the tokenizer, without the two tokens that begin and end a turn.
    """

    sources: list[str]
    max_prompt_characters: int
    max_answer_characters: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What the policy answers.

    Args:
        gold_prompts: of the training split, whose responses gold learns to tell from the answers of people.
        responses_per_gold_prompt: each of them is a pair with such an answer.
        training_prompts: others of that split, whose responses become the pairs that reward models learn from.
        responses_per_training_prompt: every two of them are a pair, so that this is an even number.
        merge_prompts: others again of that split, with as many responses, for pairs that merging learns from.
        test_prompts: of the test split; their responses are the fixed table.
        responses: to each of those; the largest n.
        temperature: of the policy.
        max_new_tokens: where a response is cut.
    """

    gold_prompts: int
    responses_per_gold_prompt: int
    training_prompts: int
    responses_per_training_prompt: int
    merge_prompts: int
    test_prompts: int
    responses: int
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class World:
    """How the labels that reward models learn from differ from gold's.

    Args:
        title: what the report calls it.
        flip_rate: share of all pairs whose label is the other one, drawn at random.
        shortcut: a text; of pairs in which one response only contains it, a share follows that instead of gold.
        shortcut_rate: that share; such labels are not flipped.
    """

    title: str
    flip_rate: float = 0.0
    shortcut: str | None = None
    shortcut_rate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """All settings of a study.

    Args:
        title: of the report.
        notes: what its reader has to know of how the study was made; the report begins with them.
        text: see [`TextSettings`].
        model: fields of `Qwen2Config` of the policy, from which all reward models start.
        policy_training: settings of `train/train.py` for it.
        gold_training: settings of `train/reward.py` for the gold reward model, which learns from people.
        samples: see [`SampleSettings`].
        worlds: by name.
        training: settings of `train/reward.py` for reward models, for the first half of their training.
        continued: what differs in the second half, dense or as a MoE.
        recipe: settings of the conversion between the halves.
        learned_merge: flags of `upcycled-moe merge --method learned`, without `--` and with underscores.
        scoring: flags of `upcycled-moe overoptimization`.
        seeds: each draws the score head and the order of the pairs; the labels are the same for all.
    """

    title: str
    notes: list[str]
    text: TextSettings
    model: dict[str, Any]
    policy_training: dict[str, Any]
    gold_training: dict[str, Any]
    samples: SampleSettings
    worlds: dict[str, World]
    training: dict[str, Any]
    continued: dict[str, Any]
    recipe: dict[str, Any]
    learned_merge: dict[str, Any]
    scoring: dict[str, Any]
    seeds: list[int]


def load_study(path: str | Path) -> StudySettings:
    """Return the study that the YAML file `path` describes.

    Raises:
        SettingsError: at the first key or value that is wrong.
    """
    content = load_yaml(path)
    check_keys(content, {setting.name for setting in fields(StudySettings)}, str(path))
    worlds = content.get("worlds")
    nested: dict[str, Any] = {}
    for name, kind in (("text", TextSettings), ("samples", SampleSettings)):
        if name in content:
            nested[name] = _build(kind, content[name], f"{path}: {name}")
    if isinstance(worlds, Mapping):
        nested["worlds"] = {name: _build(World, world, f"{path}: worlds.{name}") for name, world in worlds.items()}
    study = _build(StudySettings, {**content, **nested}, str(path))
    _check_numbers(study, str(path))
    _check_worlds(study.worlds, str(path))
    for section in ("policy_training", "gold_training", "training", "continued"):
        for name in getattr(study, section):
            if name in SET_BY_STUDY:
                raise SettingsError(f"{path}: {section}.{name} is set by the study itself; leave it out.")
    return study


def _build(kind: type, content: Any, where: str) -> Any:
    """Return an instance of the dataclass `kind`."""
    if not isinstance(content, Mapping):
        raise SettingsError(f"{where} must be a mapping, not {content!r}.")
    types = get_type_hints(kind)
    check_keys(content, set(types), where)
    for setting in fields(kind):
        if setting.name not in content:
            if setting.default is MISSING:
                raise SettingsError(f"{where}: {setting.name} is missing.")
            continue
        value, expected = content[setting.name], types[setting.name]
        plain = get_args(expected) if not get_origin(expected) or type(None) in get_args(expected) else ()
        allowed = plain or (get_origin(expected) or expected,)
        is_number = expected is float and type(value) is int
        if not is_number and (not isinstance(value, allowed) or isinstance(value, bool)):
            raise SettingsError(f"{where}: {setting.name}={value!r} has the wrong type.")
    return kind(**content)


def _check_numbers(study: StudySettings, path: str) -> None:
    for section, least in (
        ("text", {}),
        (
            "samples",
            dict.fromkeys(("responses", *(f"{kind}_prompts" for kind in ("gold", "training", "merge", "test"))), 2),
        ),
    ):
        for setting in fields(type(getattr(study, section))):
            value = getattr(getattr(study, section), setting.name)
            if isinstance(value, int) and value < least.get(setting.name, 1):
                raise SettingsError(
                    f"{path}: {section}.{setting.name}={value} must be at least {least.get(setting.name, 1)}."
                )
    samples = study.samples
    if samples.responses_per_training_prompt % 2:
        raise SettingsError(
            f"{path}: samples.responses_per_training_prompt={samples.responses_per_training_prompt} must be even: two "
            "make a pair."
        )
    if not samples.temperature > 0:
        raise SettingsError(f"{path}: samples.temperature={samples.temperature} must be above zero.")
    if not study.seeds or not all(type(seed) is int for seed in study.seeds):
        raise SettingsError(f"{path}: seeds={study.seeds} must be whole numbers, at least two.")
    if len(set(study.seeds)) != len(study.seeds) or len(study.seeds) < 2:
        raise SettingsError(f"{path}: seeds={study.seeds}: give at least two, each once; ensembles are made of them.")


def _check_worlds(worlds: Mapping[str, World], path: str) -> None:
    if not worlds:
        raise SettingsError(f"{path}: worlds is empty; describe at least one.")
    for name, world in worlds.items():
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            raise SettingsError(f"{path}: worlds: {name!r} is no name; use letters, digits, '_', '-' and '.'.")
        for rate in ("flip_rate", "shortcut_rate"):
            if not 0 <= getattr(world, rate) <= 1:
                raise SettingsError(f"{path}: worlds.{name}.{rate}={getattr(world, rate)} is outside [0, 1].")
        if bool(world.shortcut) != (world.shortcut_rate > 0):
            raise SettingsError(f"{path}: worlds.{name}: shortcut and shortcut_rate go together; give both or none.")
