"""Preference pairs of any common form, as conversations that trl takes: `prompt`, `chosen` and `rejected` messages."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets, load_dataset

from ..common.settings import SettingsError
from ..common.text import first_line
from ..common.text_files import find_text, how_to_load
from .settings import PairSettings


Messages = list[dict[str, str]]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_FORMS = (
    "lists of messages with 'role' and 'content', dialogues as text ('\\n\\nHuman: ... \\n\\nAssistant: ...'), or texts "
    "with a column 'prompt'"
)


def read_pairs(settings: PairSettings) -> Dataset:
    """Return the pairs with `prompt` (all messages but the last), `chosen` and `rejected` (the last one), and `source`.

    `source` is the column of that name, or the name of the file or dataset. Pairs whose two answers are the same, or
    whose dialogues differ before the last answer, say nothing about that answer and are left out.

    Raises:
        SettingsError: if something is missing or not preference pairs, or no pair is left.
    """
    parts = []
    for place in find_text(settings.data, settings.split):
        rows = _load(place.name, place.file, settings.split)
        if not {"chosen", "rejected"} <= set(rows.column_names):
            raise SettingsError(
                f"{place.name}: no columns 'chosen' and 'rejected'; its columns are "
                f"{', '.join(map(repr, rows.column_names))}."
            )
        pairs = [_pair(row, f"{place.name}: row {number}", place.domain) for number, row in enumerate(rows)]
        if kept := [pair for pair in pairs if pair is not None]:
            parts.append(Dataset.from_list(kept))
    if not parts:
        raise SettingsError(f"{', '.join(settings.data)}: no two answers to one prompt differ; give other pairs.")
    pairs = concatenate_datasets(parts)
    if settings.max_pairs is not None:
        pairs = pairs.select(range(min(settings.max_pairs, len(pairs))))
    return flipped(pairs, settings.flip_rate, torch.Generator().manual_seed(settings.seed))


def flipped(pairs: Dataset, rate: float, generator: torch.Generator) -> Dataset:
    """Return `pairs` with chosen and rejected exchanged in a share `rate` of them, to the nearest pair, at random."""
    indices = torch.randperm(len(pairs), generator=generator)[: round(rate * len(pairs))].tolist()
    if not indices:
        return pairs
    wrong = set(indices)

    def flip(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {"chosen": row["rejected"], "rejected": row["chosen"]} if index in wrong else {}

    return pairs.map(flip, with_indices=True, load_from_cache_file=False)


def _load(name: str, file: Any, split: str) -> Dataset:
    try:
        if file is not None:
            loader, _, _ = how_to_load(file, "chosen")
            return load_dataset(loader, data_files=str(file), split="train")
        dataset, _, config = name.partition(":")
        return load_dataset(dataset, config or None, split=split)
    # The loaders and the Hub client raise whatever the parser of the format, or the connection, raises.
    except Exception as error:
        raise SettingsError(f"{name}: cannot be read as preference pairs ({first_line(error)}).") from error


def _pair(row: Mapping[str, Any], where: str, source: str) -> dict[str, Any] | None:
    chosen, rejected = (_messages(row, column, where) for column in ("chosen", "rejected"))
    prompt, others = chosen[:-1], rejected[:-1]
    if prompt != others or chosen[-1] == rejected[-1]:
        return None
    return {
        "prompt": prompt,
        "chosen": chosen[-1:],
        "rejected": rejected[-1:],
        "source": str(row.get("source") or source),
    }


def _messages(row: Mapping[str, Any], column: str, where: str) -> Messages:
    """Return the conversation in `column`, the prompt before it, which ends in an answer."""
    prompt = row.get("prompt")
    if isinstance(row[column], str):
        messages = _of_text(row[column], prompt)
    else:
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
        messages = _of_messages(row[column])
        # Some datasets repeat the prompt in both columns.
        messages = messages if messages[: len(before)] == before else before + messages
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise SettingsError(f"{where}: {column!r} is no prompt with an assistant's answer; allowed are {_FORMS}.")
    return messages


def _of_messages(values: Sequence[Mapping[str, Any]] | None) -> Messages:
    return [{"role": str(message["role"]), "content": str(message["content"])} for message in values or []]


def _of_text(text: str, prompt: str | None) -> Messages:
    if prompt is not None:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    _, *turns = _TURN.split(text)
    return [
        {"role": _ROLES[name], "content": content.strip()}
        for name, content in zip(turns[::2], turns[1::2], strict=True)
    ]
