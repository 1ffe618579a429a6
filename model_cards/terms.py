"""Whose terms a model is under: licence and language, from the cards of what it was made of."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from ..common.hub_names import is_hub_id, is_language
from .checkpoint import Checkpoint, Parent, parent_of
from .extras import CardExtras
from .hub_terms import LICENSES


# One unit: name and link belong to the licence that they were declared with.
LICENSE_TERMS = ("license", "license_name", "license_link")
TERMS = (*LICENSE_TERMS, "language")


def read_terms(folder: Path) -> dict[str, Any]:
    """Return what the card in `folder` declares of licence, language and base model; nothing if it cannot be read."""
    card = folder / "README.md"
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data if card.is_file() else ModelCardData()
    except (ValueError, YAMLError):
        return {}
    return {name: data.get(name) for name in (*TERMS, "base_model") if data.get(name) is not None}


def terms_for_metadata(checkpoint: Checkpoint, extras: CardExtras) -> dict[str, Any]:
    """Return the terms that are given, and what the Hub would take of those that are inherited."""
    given = {name: getattr(extras, name) for name in TERMS if getattr(extras, name)}
    if "language" in given:
        given["language"] = list(given["language"])
    inherited = known_terms(inherited_terms(checkpoint))
    if "license" in given:
        inherited = {name: value for name, value in inherited.items() if name not in LICENSE_TERMS}
    return inherited | given


def inherited_terms(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the nearest card declared; of several dense models, what all agree on."""
    steps = [step for step in checkpoint.steps if step.get("terms") or step.get("source_terms")]
    declared = steps[-1].get("source_terms") or [steps[-1]["terms"]] if steps else []
    if not declared and not checkpoint.is_from_scratch:
        declared = [parent.terms for parent in checkpoint.parents]
    if not declared:
        return {}
    agreed: dict[str, Any] = {}
    for unit in (LICENSE_TERMS, ("language",)):
        first, *others = ({name: terms[name] for name in unit if name in terms} for terms in declared)
        agreed |= first if all(other == first for other in others) else {}
    return agreed


def known_terms(terms: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of inherited `terms` that the Hub would take: a parent's card may hold anything."""
    known: dict[str, Any] = {}
    names = _as_list(terms.get("license"))
    is_named = "other" not in names or isinstance(terms.get("license_name"), str)
    if names and is_named and all(isinstance(name, str) and name in LICENSES for name in names):
        known |= {name: terms[name] for name in LICENSE_TERMS if name in terms}
    codes = _as_list(terms.get("language"))
    if codes and all(map(is_language, codes)):
        known["language"] = terms["language"]
    return known


def base_models(parents: Sequence[Parent]) -> list[str]:
    """Return the models on the Hub that these are, or that their own cards name as what they were made of."""
    names: list[str] = []
    for parent in parents:
        named = _as_list(parent.terms.get("base_model"))
        of_card = [name for name in named if isinstance(name, str) and is_hub_id(name)]
        names += [parent.name] if parent.is_hub_id else of_card
    return list(dict.fromkeys(names))


def merged_parents(checkpoint: Checkpoint) -> list[Parent]:
    """Return the whole checkpoints that it, or what it was made of, is the last merge of."""
    steps = [step for step in checkpoint.steps if step.get("other_sources")]
    if not steps:
        return []
    sources = [steps[-1]["source"], *steps[-1]["other_sources"]]
    terms = steps[-1].get("source_terms") or [{}] * len(sources)
    return [parent_of(source, declared) for source, declared in zip(sources, terms, strict=False)]


def first_parents(checkpoint: Checkpoint) -> list[Parent]:
    """Return the models that it began with: merged ones, those of the conversion, or what it was trained from."""
    if merged := merged_parents(checkpoint):
        return merged
    if checkpoint.parents or not checkpoint.steps or not checkpoint.steps[0].get("source"):
        return checkpoint.parents
    step = checkpoint.steps[0]
    return [parent_of(step["source"], step.get("terms"))]


def licence(checkpoint: Checkpoint, extras: CardExtras, data: ModelCardData) -> str | None:
    """Return in Markdown whose terms the model is under; None for one that has nothing of another."""
    shown = _shown_licence(data)
    if extras.license:
        return f"{shown}."
    parents = first_parents(checkpoint)
    if not parents or (checkpoint.is_from_scratch and not data.license):
        return None
    linked = ", ".join(parent.link for parent in parents)
    if data.license:
        return f"{shown}, as {linked}."
    if len(parents) > 1:
        return f"The terms of each of {linked} apply; their cards name no licence that they share."
    if names := _as_list(inherited_terms(checkpoint).get("license")):
        called = ", ".join(f"`{_in_a_line(name)}`" for name in names)
        return f"The terms of {linked} apply; its card calls the licence {called}, which the Hub does not know so."
    return f"The terms of {linked} apply; which these are, its card did not say."


def unknown_languages(checkpoint: Checkpoint, data: ModelCardData) -> str | None:
    """Return in a sentence what a parent's card calls its languages, where that is no code; None where it is one."""
    codes = _as_list(inherited_terms(checkpoint).get("language"))
    if not codes or data.get("language"):
        return None
    called = ", ".join(f"`{_in_a_line(code)}`" for code in codes)
    return f"What it was made of was for {called}, as its card has it; these are no codes that the Hub knows."


def _shown_licence(data: ModelCardData) -> str:
    names = [f"`{name}`" for name in _as_list(data.license) if name != "other"]
    if data.get("license_name"):
        names.append(f"`{data.get('license_name')}`")
    shown = ", ".join(names)
    link = data.get("license_link")
    return f"[{shown}]({link})" if link else shown


def _in_a_line(value: Any) -> str:
    return " ".join(str(value).replace("`", "'").split())


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
