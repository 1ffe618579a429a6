"""Several dense checkpoints that become one model, and whether they fit each other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.streaming.stored import SourceError
from .recipe import ConversionRecipe
from .source import DenseSource, expected_shapes, open_source


# Fields of the configuration that change what the model computes; the others are about training and generation.
COMPUTATION_FIELDS = (
    "model_type",
    "architectures",
    "vocab_size",
    "num_labels",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "attention_bias",
    "hidden_act",
    "rms_norm_eps",
    "layer_types",
    "sliding_window",
    "tie_word_embeddings",
)
WAY_OUT = "give checkpoints that were trained from one model"


def open_sources(source: DenseSource, recipe: ConversionRecipe) -> tuple[DenseSource, ...]:
    """Return all dense checkpoints of a conversion: `source`, and what `recipe.expert_sources` names.

    Weights are downloaded unless `source` was opened without; none is read.

    Raises:
        SourceError: if one cannot be opened, does not fit `source`, or is there twice.
    """
    sources = [source]
    for name in recipe.expert_sources:
        other = open_source(*split_revision(name), weights=not source.headers_only)
        for earlier in sources:
            if other.folder.resolve() == earlier.folder.resolve():
                raise SourceError(
                    f"expert_sources: {name} and {earlier.name} are the same checkpoint; name each of them once, "
                    "since all give equal shares of the experts."
                )
        check_fit(source, other)
        sources.append(other)
    return tuple(sources)


def split_revision(name: str) -> tuple[str, str | None]:
    """Return Hub id and revision of `ID@REVISION`; what has no revision, or is on the disk, stays whole."""
    model, _, revision = name.rpartition("@")
    return (model, revision) if model and revision and not Path(name).exists() else (name, None)


def with_commits(recipe: ConversionRecipe, sources: tuple[DenseSource, ...]) -> ConversionRecipe:
    """Return `recipe` with the commits that its `expert_sources` on the Hub were found at."""
    names = [other.name if other.revision is None else f"{other.name}@{other.revision}" for other in sources[1:]]
    return replace(recipe, expert_sources=names)


def check_fit(first: DenseSource, other: DenseSource) -> None:
    """Check that the FFNs of `other` can be experts in a model with the attention of `first`, or the mean of both.

    Raises:
        SourceError: if not; it names the first thing that differs.
    """
    expected, actual = _computation(first), _computation(other)
    for name in (*expected, *actual):
        if expected.get(name) != actual.get(name):
            raise _misfit(first, other, name, expected.get(name), actual.get(name))
    # Equal configurations give equal names and shapes; types are the files' own.
    for name in expected_shapes(first.config):
        types = first.tensors[name].dtype, other.tensors[name].dtype
        if types[0] != types[1]:
            raise SourceError(
                f"expert_sources: {other.name} does not fit {first.name}: {name} has type {types[1]}, not {types[0]}; "
                "save both models in one type first."
            )
    _check_vocabularies(first, other)


def _computation(source: DenseSource) -> dict[str, Any]:
    """Return all settings that change what the model computes, by their names."""
    config = source.config
    settings = {name: getattr(config, name, None) for name in COMPUTATION_FIELDS}
    if not config.architectures[0].endswith("ForSequenceClassification"):
        settings.pop("num_labels")
    settings["head_dim"] = source.head_dim
    rope = dict(config.rope_parameters)
    settings |= {f"rope_parameters.{name}": value for name, value in rope.items()}
    if rope.get("rope_type", "default") != "default":
        # Scaled rotary embeddings may depend on the length that the model is meant for.
        settings["max_position_embeddings"] = config.max_position_embeddings
    return settings


def _check_vocabularies(first: DenseSource, other: DenseSource) -> None:
    """Check that the tokenizers give the same tokens, as far as both checkpoints have files that say so."""
    for file_name in ("tokenizer.json", "vocab.json"):
        paths = [source.folder / file_name for source in (first, other)]
        if not all(path.is_file() for path in paths):
            continue
        (expected, expected_merges), (actual, actual_merges) = map(_read_vocabulary, paths)
        for token in (*expected, *actual):
            if expected.get(token) != actual.get(token):
                raise _misfit(first, other, f"token {token!r} in {file_name}", expected.get(token), actual.get(token))
        if expected_merges != actual_merges:
            raise SourceError(
                f"expert_sources: {other.name} does not fit {first.name}: the merges in their {file_name} differ; "
                f"{WAY_OUT}."
            )
        return


def _read_vocabulary(path: Path) -> tuple[dict[str, int], list[str]]:
    """Return tokens and merges of a tokenizer.json or vocab.json; settings vary with the version that wrote it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "vocab.json":
            return dict(content), []
        model = content["model"]
        # Newer files hold pairs instead of two words.
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        return dict(model["vocab"]) | added, merges
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"{path}: not a tokenizer's vocabulary ({error}); fetch it again.") from None


def _misfit(first: DenseSource, other: DenseSource, name: str, expected: Any, actual: Any) -> SourceError:
    return SourceError(
        f"expert_sources: {other.name} does not fit {first.name}: {name} is {actual!r}, not {expected!r}; {WAY_OUT}."
    )
