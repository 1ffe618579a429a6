"""One fixed table of samples: prompts, and the same number of responses to each."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..common.settings import SettingsError
from ..common.text import first_line


Messages = list[dict[str, str]]

MIN_PROMPTS = 2
# Of a parquet file, where a table of ours says what it is.
METADATA = b"upcycled_moe.overoptimization"

_KINDS = (".parquet", ".jsonl")


@dataclass(frozen=True)
class SampleTable:
    """Prompts and responses.

    Dimensions: P prompts, N responses to each.

    Args:
        prompts: messages, the last of which is to be answered [P].
        responses: [P][N].
        origin: where they come from; it fits in JSON.
        columns: other lists of N numbers that the file has, by name [P, N].
    """

    prompts: list[Messages]
    responses: list[list[str]]
    origin: dict[str, Any]
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """P and N."""
        return len(self.responses), len(self.responses[0])

    @cached_property
    def sha256(self) -> str:
        """What tells these prompts and responses from others."""
        return hashlib.sha256(json.dumps([self.prompts, self.responses]).encode()).hexdigest()

    @property
    def num_alike(self) -> int:
        """How many prompts have responses that are all the same."""
        return sum(len(set(responses)) == 1 for responses in self.responses)

    def conversations(self) -> list[Messages]:
        """Return each prompt with each response [P · N], all responses to a prompt together."""
        return [
            [*prompt, {"role": "assistant", "content": response}]
            for prompt, responses in zip(self.prompts, self.responses, strict=True)
            for response in responses
        ]


def read_samples(path: Path) -> SampleTable:
    """Return the table in a parquet or JSON lines file: `prompt`, a text or messages, and `responses`, texts.

    Raises:
        SettingsError: if it cannot be read, or prompts do not all have the same number of responses, two at least.
    """
    rows = read_rows(path)
    for name in ("prompt", "responses"):
        if rows and name not in rows[0]:
            raise SettingsError(f"{path}: no column {name!r}; its columns are {', '.join(map(repr, rows[0]))}.")
    prompts = [as_messages(row.get("prompt"), f"{path}: row {number}") for number, row in enumerate(rows)]
    responses = [_responses(row.get("responses"), f"{path}: row {number}") for number, row in enumerate(rows)]
    if len(rows) < MIN_PROMPTS:
        raise SettingsError(f"{path}: has {len(rows)} prompts; give {MIN_PROMPTS} at least, better a hundred.")
    for number, texts in enumerate(responses):
        if len(texts) != len(responses[0]):
            raise SettingsError(
                f"{path}: row {number} has {len(texts)} responses and row 0 has {len(responses[0])}; give each prompt "
                "the same number."
            )
    if len(responses[0]) < 2:
        raise SettingsError(f"{path}: has one response to a prompt; there is nothing to choose from.")
    origin = (table_facts(path) or {}).get("origin", {"file": path.name})
    return SampleTable(prompts, responses, origin, _number_columns(rows, len(responses[0])))


def table_facts(path: Path) -> dict[str, Any] | None:
    """Return what a table of ours says of its samples and scores; None if `path` is no such table."""
    try:
        return json.loads(pq.read_schema(path).metadata[METADATA])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError):
        return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a parquet or JSON lines file.

    Raises:
        SettingsError: if it cannot be read.
    """
    if not path.is_file() or path.suffix not in _KINDS:
        what = "unknown kind of file" if path.is_file() else "no such file"
        raise SettingsError(f"{path}: {what}; give samples as {' or '.join(_KINDS)}.")
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path).to_pylist()
        # A line ends at its newline only: a text may have other characters that separate lines.
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines if line.strip()]
    except (pa.ArrowInvalid, ValueError) as error:
        raise SettingsError(f"{path}: cannot be read ({first_line(error)}).") from error
    if not all(isinstance(row, dict) for row in rows):
        raise SettingsError(f"{path}: a line is no JSON object.")
    return rows


def as_messages(prompt: Any, where: str) -> Messages:
    """Return a prompt as messages: a text is what the user says.

    Raises:
        SettingsError: if it is neither text nor messages, or no Unicode.
    """
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    is_dialogue = isinstance(prompt, list) and all(_is_message(message) for message in prompt)
    if not is_dialogue or not prompt or prompt[-1]["role"] == "assistant":
        raise SettingsError(
            f"{where}: 'prompt' is neither a text nor messages with 'role' and 'content' that await an answer."
        )
    _check_text([message["content"] for message in prompt], f"{where}: 'prompt'")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _responses(texts: Any, where: str) -> list[str]:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SettingsError(f"{where}: 'responses' is no list of texts.")
    _check_text(texts, f"{where}: 'responses'")
    return texts


def _check_text(texts: list[str], where: str) -> None:
    """Check what JSON lets through, and no tokenizer or file takes: halves of characters, as in "\\ud800"."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SettingsError(f"{where} has half a character ({first_line(error)}); remove it.") from error


def _number_columns(rows: list[dict[str, Any]], num_responses: int) -> dict[str, np.ndarray]:
    """Return the columns that have a number for each response in every row."""
    columns = {}
    for name in rows[0]:
        lists = [row.get(name) for row in rows]
        if all(_are_numbers(numbers) and len(numbers) == num_responses for numbers in lists):
            columns[name] = np.array(lists, dtype=float)
    return columns


def _are_numbers(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(
        isinstance(number, int | float) and not isinstance(number, bool) for number in numbers
    )
