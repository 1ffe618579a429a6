"""Streamed text: files or Hub datasets in, documents or packed blocks of tokens out."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Features, IterableDataset, Value, load_dataset
from transformers import PreTrainedTokenizerBase

from .packing import PackedBlocks, TokenizedText, digest
from .settings import SettingsError
from .text_files import TextPlace, find_text, how_to_load


# Where documents say their domain, if nothing else is asked for.
DOMAIN_COLUMN = "domain"
DOCUMENT_FEATURES = Features({"text": Value("string"), "domain": Value("string")})

# Names of files and datasets that a description holds; its digest is over all.
MAX_DESCRIBED = 3


@dataclass(frozen=True)
class TextSource:
    """One file or dataset.

    Args:
        name: File, or dataset on the Hub.
        documents: Its rows as `{"text": ..., "domain": ...}`, in order.
        domain: The domain of the first document.
        has_domain_column: Each document says its domain; otherwise all have the same.
        identity: What tells its documents from others, beginning with a name, wherever the files are; see
            `TextStream.describe`. It fits in JSON.
    """

    name: str
    documents: IterableDataset
    domain: str
    has_domain_column: bool = False
    identity: tuple[Any, ...] = ()


class TextStream(torch.utils.data.IterableDataset):
    """Documents `{"text": ..., "domain": ...}` of several sources that take turns, one document each.

    The beginning shows all of them, every document comes once, and the order depends on nothing but the list of
    sources. The position can be saved and restored exactly, as with a stream of `datasets`.

    `datasets.interleave_datasets` does the same, but reads ahead in threads and then waits five seconds for them at
    the end of each pass.
    """

    def __init__(self, sources: Sequence[TextSource]):
        self.sources = list(sources)
        self._state = self._start = self._beginning()

    def _beginning(self) -> dict[str, Any]:
        return {"turn": 0, "is_exhausted": [False] * len(self.sources), "streams": [None] * len(self.sources)}

    def describe(self) -> str:
        """Return names of the sources, and a digest of what the documents and their order depend on.

        Files count by name, size and column, so that they may move; datasets on the Hub by name, split and column.
        """
        identities = [source.identity or (source.name,) for source in self.sources]
        names = [str(name) for name, *_ in identities[:MAX_DESCRIBED]]
        if len(identities) > MAX_DESCRIBED:
            names.append("...")
        return f"{', '.join(names)} (digest {digest(json.dumps(identities).encode())})"

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last document that was read; it fits in JSON."""
        return self._state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Let iterations begin where `state` was taken, or with None at the beginning."""
        self._start = state or self._beginning()

    def __iter__(self) -> Iterator[dict[str, str]]:
        """Yield the documents.

        Raises:
            SettingsError: if a source turns out not to be readable to its end.
            OSError: if it went away.
        """
        self._state = state = self._start
        for source, stream_state in zip(self.sources, state["streams"], strict=True):
            source.documents.load_state_dict(stream_state)
        iterators = [iter(source.documents) for source in self.sources]
        while not all(state["is_exhausted"]):
            turn = state["turn"]
            document = None if state["is_exhausted"][turn] else next_document(iterators[turn], self.sources[turn].name)
            # A new one each time: whoever was given the last one keeps it.
            state = {
                "turn": (turn + 1) % len(self.sources),
                "is_exhausted": _replaced(state["is_exhausted"], turn, document is None),
                "streams": state["streams"],
            }
            if document is not None:
                state["streams"] = _replaced(state["streams"], turn, self.sources[turn].documents.state_dict())
            self._state = state
            if document is not None:
                yield document


def next_document(documents: Iterator[dict[str, str]], name: str) -> dict[str, str] | None:
    """Return the next of the `documents` of the source `name`, or None at their end.

    Raises:
        SettingsError: if it cannot be parsed.
        OSError: if it cannot be read.
    """
    try:
        return next(documents, None)
    except OSError as error:
        raise OSError(f"{name}: cannot be read on ({first_line(error)}).") from error
    # The readers raise whatever the parser of the format raises.
    except Exception as error:
        raise SettingsError(f"{name}: not readable from some document on ({first_line(error)}).") from error


def _replaced(items: list, index: int, item: Any) -> list:
    return [*items[:index], item, *items[index + 1 :]]


def open_text(
    sources: Sequence[str],
    split: str = "train",
    text_column: str = "text",
    domain_column: str | None = None,
    whole_folders: bool = False,
) -> TextStream:
    """Return the documents of all sources, streamed, with `text` and `domain`.

    Args:
        sources: Files (parquet, jsonl or json, txt with one document a file), folders, globs, and Hub datasets
            `org/name` or `org/name:config`.
        split: Split of a Hub dataset. In a folder, files named `train`, `validation` or `test`, or `*_train` and so
            on, or in a sub-folder of that name, belong to that split, others to `train`; a file or glob is taken as it
            is.
        text_column: Column that holds the text.
        domain_column: Column that holds the domain, which all sources must have; by default `domain`, which they may
            have. Without it the place of a file says its domain; see `find_text`.
        whole_folders: Read all files of a folder in which none names a split, whatever `split` says.

    Raises:
        SettingsError: if a source is missing, of an unknown kind, empty, or has no such column.
    """
    opened = []
    for place in find_text(sources, split, whole_folders):
        if place.file is None:
            opened.append(_open_hub_dataset(place, split, text_column, domain_column))
        else:
            opened.append(_open_file(place, text_column, domain_column))
    return TextStream(opened)


def _open_file(place: TextPlace, text_column: str, domain_column: str | None) -> TextSource:
    file = place.file
    loader, options, column = how_to_load(file, text_column)
    try:
        rows = load_dataset(loader, data_files=str(file), split="train", streaming=True, **options)
        identity = (file.name, file.stat().st_size, column)
        return _as_source(rows, place, column, domain_column, identity)
    except SettingsError:
        raise
    # The loaders raise whatever the parser of the format raises.
    except Exception as error:
        raise SettingsError(f"{file}: not a readable {loader} file ({first_line(error)}).") from error


def _open_hub_dataset(place: TextPlace, split: str, text_column: str, domain_column: str | None) -> TextSource:
    name, _, config = place.name.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split, streaming=True)
        identity = (place.name, split, text_column)
        return _as_source(rows, place, text_column, domain_column, identity)
    except SettingsError:
        raise
    # The Hub client raises errors of many libraries: no such dataset, configuration, split, access or connection.
    except Exception as error:
        raise SettingsError(
            f"{place.name}: no such file or folder, and no {split} split to be read on the Hub ({first_line(error)})."
        ) from error


def first_line(error: Exception) -> str:
    """Return what `error` says, cut at the first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _as_source(
    rows: IterableDataset,
    place: TextPlace,
    text_column: str,
    domain_column: str | None,
    identity: tuple[Any, ...],
) -> TextSource:
    """Return `rows` as a source with the columns `text` and `domain` only; rows that name none have the place's."""
    first = next(iter(rows), None)
    check_columns(first, place.name, text_column, domain_column)
    column = domain_column or DOMAIN_COLUMN

    def to_document(row: dict[str, Any]) -> dict[str, str]:
        said = row.get(column)
        return {"text": row[text_column] or "", "domain": place.domain if said in (None, "") else str(said)}

    documents = rows.map(to_document, remove_columns=list(first), features=DOCUMENT_FEATURES)
    return TextSource(place.name, documents, to_document(first)["domain"], column in first, identity)


def check_columns(first: dict[str, Any] | None, name: str, text_column: str, domain_column: str | None = None) -> None:
    """Check the first row of a source.

    Raises:
        SettingsError: if there is none, no text in `text_column`, or no `domain_column` although one is named.
    """
    if first is None:
        raise SettingsError(f"{name}: there is no text in it.")
    for column in (text_column, domain_column):
        if column is not None and column not in first:
            raise SettingsError(f"{name}: no column {column!r}; its columns are {', '.join(map(repr, first))}.")
    if not isinstance(first[text_column], str | None):
        raise SettingsError(f"{name}: column {text_column!r} holds {type(first[text_column]).__name__}, not text.")


def pack_blocks(
    documents: TextStream,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    repeat: bool = False,
) -> PackedBlocks:
    """Return `documents` as blocks of `block_size` tokens; see [`PackedBlocks`]."""
    return PackedBlocks(TokenizedText(documents, tokenizer, repeat), block_size)
