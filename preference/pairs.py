"""Preference pairs of any common form, as conversations that trl takes: `prompt`, `chosen` and `rejected` messages."""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, load_dataset

from ..common.progress import Progress
from ..common.seeds import seed_of
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

    `source` is the column of that name, or the name of the file or dataset. A column `system` comes in front. Pairs
    whose two answers are the same, or whose dialogues differ before the last answer, say nothing about that answer and
    are left out. Files are read no further than `max_pairs` takes.

    Args:
        progress: it is warned of pairs that are left out, and of files that `max_pairs` leaves unread.

    Raises:
        SettingsError: if something is missing or not preference pairs, or no pair is left.
    """
    places = iter(find_text(settings.data, settings.split))
    rows = (row for place in places for row in _rows(place, settings.split))
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
    if (unread := [place.name for place in places]) and progress is not None:
        progress.warn(
            f"The first {len(pairs):,} pairs are taken, so {len(unread):,} of the files or datasets are not read: "
            f"{', '.join(unread[:3])}{', ...' * (len(unread) > 3)}."
        )
    # Those who share out or shuffle the pairs by the same seed must not draw the same permutation.
    generator = torch.Generator().manual_seed(seed_of(settings.seed, "label noise"))
    return flipped(Dataset.from_list(pairs), settings.flip_rate, generator)


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
    # As a file's lines are counted, from 1.
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
        number += 1
        yield _pair(row, f"{place.name}: row {number}", place.domain)


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
    """Return the conversation in `column` after what is in `system` and `prompt`; it ends in an answer.

    Raises:
        SettingsError: if there is none, or it begins otherwise than these columns.
    """
    try:
        system, before = _messages(row.get("system") or None, "system"), _messages(row.get("prompt") or None, "user")
        messages = _messages(row[column], "assistant")
    except (TypeError, KeyError, ValueError, AttributeError):
        system, before, messages = [], [], []
    messages = _continued(before, messages, f"{where}: {column!r}", "prompt")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise SettingsError(f"{where}: {column!r} is no prompt with an assistant's answer; allowed are {_FORMS}.")
    return _continued(system, messages, f"{where}: {column!r}", "system")


def _continued(before: Messages, messages: Messages, where: str, column: str) -> Messages:
    """Return `messages` with those that come `before` them, which some datasets repeat, but for white space.

    Raises:
        SettingsError: if `messages` are a whole conversation that begins otherwise.
    """
    if not before or not messages:
        return messages
    # A prompt may be repeated after a system message.
    skipped = int(messages[0]["role"] == "system" != before[0]["role"])
    if _stripped(messages[skipped : skipped + len(before)]) == _stripped(before):
        return messages
    if messages[0]["role"] in ("system", before[-1]["role"]):
        raise SettingsError(f"{where} does not begin with what {column!r} holds; leave one of them out.")
    return before + messages


def _stripped(messages: Messages) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


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
