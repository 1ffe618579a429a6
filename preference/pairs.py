"""Preference pairs of any common form, as conversations that trl takes: `prompt`, `chosen` and `rejected` messages."""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, load_dataset

from ..common.progress import Progress
from ..common.settings import SettingsError
from ..common.text import first_line
from ..common.text_files import TextPlace, find_text, how_to_load
from .settings import PairSettings


Messages = list[dict[str, str]]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_FORMS = (
    "lists of messages with 'role' and 'content', dialogues as text ('\\n\\nHuman: ... \\n\\nAssistant: ...'), or "
    "texts with a column 'prompt'"
)


def read_pairs(settings: PairSettings, progress: Progress | None = None) -> Dataset:
    """Return the pairs with `prompt` (all messages but the last), `chosen` and `rejected` (one message), and `source`.

    `source` is the column of that name, or the name of the file or dataset. Pairs whose two answers are the same, or
    whose dialogues differ before the last answer, say nothing about that answer and are left out. Files are read no
    further than `max_pairs` takes.

    Args:
        progress: it is warned of pairs that are left out.

    Raises:
        SettingsError: if something is missing or not preference pairs, or no pair is left.
    """
    rows = (row for place in find_text(settings.data, settings.split) for row in _rows(place, settings.split))
    num_left_out = 0

    def telling() -> Iterator[dict[str, Any]]:
        nonlocal num_left_out
        for pair in rows:
            if pair is None:
                num_left_out += 1
            else:
                yield pair

    pairs = list(islice(telling(), settings.max_pairs))
    if not pairs:
        raise SettingsError(f"{', '.join(settings.data)}: no two answers to one prompt differ; give other pairs.")
    if num_left_out and progress is not None:
        progress.warn(
            f"{', '.join(settings.data)}: {num_left_out:,} of {num_left_out + len(pairs):,} pairs are left out, as "
            "their answers are the same, or their dialogues differ before the last answer."
        )
    return flipped(Dataset.from_list(pairs), settings.flip_rate, torch.Generator().manual_seed(settings.seed))


def flipped(pairs: Dataset, rate: float, generator: torch.Generator) -> Dataset:
    """Return `pairs` with chosen and rejected exchanged in a share `rate` of them, to the nearest pair, at random."""
    wrong = set(torch.randperm(len(pairs), generator=generator)[: round(rate * len(pairs))].tolist())
    if not wrong:
        return pairs
    rows = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if index in wrong else row
        for index, row in enumerate(pairs)
    ]
    return Dataset.from_list(rows, features=pairs.features)


def _rows(place: TextPlace, split: str) -> Iterator[dict[str, Any] | None]:
    """Yield the pairs of a file or dataset; None for one that says nothing."""
    rows = _opened(place, split)
    number = 0
    while True:
        # The loaders and the Hub client raise whatever the parser of the format, or the connection, raises.
        try:
            row = next(rows, None)
        except Exception as error:
            raise SettingsError(
                f"{place.name}: cannot be read as preference pairs after row {number} ({first_line(error)})."
            ) from error
        if row is None:
            return
        if not {"chosen", "rejected"} <= row.keys():
            raise SettingsError(
                f"{place.name}: no columns 'chosen' and 'rejected'; its columns are {', '.join(map(repr, row))}."
            )
        yield _pair(row, f"{place.name}: row {number}", place.domain)
        number += 1


def _opened(place: TextPlace, split: str) -> Iterator[Mapping[str, Any]]:
    """Return the rows, read as they come: nothing is copied into a cache."""
    try:
        if place.file is not None:
            loader, _, _ = how_to_load(place.file, "chosen")
            return iter(load_dataset(loader, data_files=str(place.file), split="train", streaming=True))
        dataset, _, config = place.name.partition(":")
        return iter(load_dataset(dataset, config or None, split=split, streaming=True))
    except Exception as error:
        raise SettingsError(f"{place.name}: cannot be read as preference pairs ({first_line(error)}).") from error


def _pair(row: Mapping[str, Any], where: str, source: str) -> dict[str, Any] | None:
    chosen, rejected = (_conversation(row, column, where) for column in ("chosen", "rejected"))
    prompt, others = chosen[:-1], rejected[:-1]
    if prompt != others or chosen[-1] == rejected[-1]:
        return None
    return {
        "prompt": prompt,
        "chosen": chosen[-1:],
        "rejected": rejected[-1:],
        "source": str(row.get("source") or source),
    }


def _conversation(row: Mapping[str, Any], column: str, where: str) -> Messages:
    """Return the conversation in `column` after what is in `prompt`; it ends in an answer.

    Raises:
        SettingsError: if there is none.
    """
    try:
        before = _messages(row.get("prompt"), "user")
        messages = _answered(row[column], row.get("prompt"))
        # Some datasets repeat the prompt in both columns.
        messages = messages if messages[: len(before)] == before else before + messages
    except (TypeError, KeyError, ValueError, AttributeError):
        messages = []
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise SettingsError(f"{where}: {column!r} is no prompt with an assistant's answer; allowed are {_FORMS}.")
    return messages


def _answered(value: Any, prompt: Any) -> Messages:
    """Return the messages of an answer, or of a conversation that ends in one."""
    if isinstance(value, str) and isinstance(prompt, str) and prompt and value.startswith(prompt):
        value = value.removeprefix(prompt)
    return _messages(value, "assistant")


def _messages(value: Any, role: str) -> Messages:
    """Return messages that are a list, a dialogue as text, or one text, which is of `role`.

    Raises:
        TypeError, KeyError or ValueError: if they are something else.
    """
    if value is None:
        return []
    if isinstance(value, str):
        before, *turns = _TURN.split(value)
        if not turns or before.strip():
            return [{"role": role, "content": value}]
        messages = [
            {"role": _ROLES[name], "content": content.strip()}
            for name, content in zip(turns[::2], turns[1::2], strict=True)
        ]
        # A prompt may end where the answer begins.
        return messages[:-1] if role == "user" and not messages[-1]["content"] else messages
    return [_message(message) for message in value]


def _message(message: Mapping[str, Any]) -> dict[str, str]:
    role, content = message["role"], message["content"]
    if not (isinstance(role, str) and isinstance(content, str)):
        raise TypeError
    return {"role": role, "content": content}
