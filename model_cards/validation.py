"""What the Hub would say against a card, found without asking it."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from ..common.hub_names import is_language
from .hub_terms import BASE_MODEL_RELATIONS, LICENSES, PIPELINE_TAGS
from .pictures import local_pictures


# Larger ones the Hub stores apart and does not show.
MAX_CARD_BYTES = 10_000_000


def card_problems(text: str, folder: Path | None = None) -> list[str]:
    """Return what is wrong with the model card `text`, one line for each problem, its field first.

    Args:
        folder: that the card lies in; its pictures have to be there.
    """
    try:
        card = ModelCard(text)
    except (TypeError, ValueError, YAMLError) as error:
        # What follows is advice on an argument of the reader.
        reason = " ".join(str(error).split()).partition(" Pass `ignore")[0]
        return [f"metadata: cannot be read ({reason.rstrip('.')})."]
    problems = [problem for field, check in _CHECKS.items() for problem in check(field, card.data.to_dict())]
    if (num_bytes := len(text.encode("utf-8"))) > MAX_CARD_BYTES:
        problems.append(f"card: has {num_bytes:,} bytes, more than the {MAX_CARD_BYTES:,} that the Hub shows.")
    if folder is not None:
        problems += _missing_pictures(card.text, folder)
    return problems


def _license(field: str, data: Mapping[str, Any]) -> Iterator[str]:
    # A list of several is allowed.
    names = _as_list(data.get(field))
    for name in names:
        if name not in LICENSES:
            yield f"{field}: {name!r} is not in the Hub's list; take 'other', with a license_name and a license_link."
    if "other" in names and not data.get("license_name"):
        yield f"{field}: 'other' needs a license_name."


def _repo_ids(field: str, data: Mapping[str, Any]) -> Iterator[str]:
    for name in _as_list(data.get(field)):
        try:
            validate_repo_id(name)
        except HFValidationError:
            yield f"{field}: {name!r} is not the id of a repository on the Hub, such as org/name."


def _one_of(allowed: frozenset[str]) -> Callable[[str, Mapping[str, Any]], Iterator[str]]:
    def check(field: str, data: Mapping[str, Any]) -> Iterator[str]:
        value = data.get(field)
        if value is not None and value not in allowed:
            yield f"{field}: {value!r} is not known to the Hub; allowed: {', '.join(sorted(allowed))}."

    return check


def _languages(field: str, data: Mapping[str, Any]) -> Iterator[str]:
    for code in _as_list(data.get(field)):
        if not is_language(code):
            yield f"{field}: {code!r} is not the code of a language (ISO 639-1 or 639-3, such as 'en')."


def _tags(field: str, data: Mapping[str, Any]) -> Iterator[str]:
    for tag in _as_list(data.get(field)):
        if not isinstance(tag, str) or not tag.strip():
            yield f"{field}: {tag!r} is not a word."


def _model_index(field: str, data: Mapping[str, Any]) -> Iterator[str]:
    if field not in data:
        return
    # Its form was checked when the card was read.
    _, results = model_index_to_eval_results(data[field])
    for result in results:
        value = result.metric_value
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            yield f"{field}: {result.metric_type} of {result.dataset_name} is {value!r} instead of a number."


_CHECKS: dict[str, Callable[[str, Mapping[str, Any]], Iterator[str]]] = {
    "license": _license,
    "language": _languages,
    "base_model": _repo_ids,
    "base_model_relation": _one_of(BASE_MODEL_RELATIONS),
    "datasets": _repo_ids,
    "pipeline_tag": _one_of(PIPELINE_TAGS),
    "tags": _tags,
    "model-index": _model_index,
}


def _missing_pictures(text: str, folder: Path) -> Iterator[str]:
    for path in local_pictures(text):
        if not (folder / path).is_file():
            yield f"picture: {path} is not in {folder}."


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
