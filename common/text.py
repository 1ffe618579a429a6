"""Streamed text: files or Hub datasets in, documents or packed blocks of tokens out.

Dimensions: S block size.
"""

import glob
import re
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Features, IterableDataset, Value, load_dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .settings import SettingsError


logger = logging.get_logger(__name__)

# What `datasets` calls the loader of each kind of file.
LOADERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".txt": "text"}
SPLITS = ("train", "validation", "test")
DOCUMENT_FEATURES = Features({"text": Value("string"), "domain": Value("string")})

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?$")


class TextStream(torch.utils.data.IterableDataset):
    """Documents `{"text": ..., "domain": ...}` of several streams that take turns, one document each.

    The beginning shows all of them, every document comes once, and the order depends on nothing but the list of
    streams. The position can be saved and restored exactly, as with a stream of `datasets`.

    `datasets.interleave_datasets` does the same, but reads ahead in threads and then waits five seconds for them at
    the end of each pass.
    """

    def __init__(self, streams: Sequence[IterableDataset], domains: Sequence[str | None] | None = None):
        self.streams = list(streams)
        # The one domain of each stream, or None where its documents say it.
        self.domains = [None] * len(self.streams) if domains is None else list(domains)
        self._state = self._start = self._beginning()

    def _beginning(self) -> dict[str, Any]:
        return {"turn": 0, "is_exhausted": [False] * len(self.streams), "streams": [None] * len(self.streams)}

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last document that was read; it fits in JSON."""
        return self._state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Let iterations begin where `state` was taken, or with None at the beginning."""
        self._start = state or self._beginning()

    def __iter__(self) -> Iterator[dict[str, str]]:
        self._state = state = self._start
        for stream, stream_state in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(stream_state)
        iterators = [iter(stream) for stream in self.streams]
        while not all(state["is_exhausted"]):
            turn = state["turn"]
            document = None if state["is_exhausted"][turn] else next(iterators[turn], None)
            # A new one each time: whoever was given the last one keeps it.
            state = {
                "turn": (turn + 1) % len(self.streams),
                "is_exhausted": _replaced(state["is_exhausted"], turn, document is None),
                "streams": state["streams"],
            }
            if document is not None:
                state["streams"] = _replaced(state["streams"], turn, self.streams[turn].state_dict())
            self._state = state
            if document is not None:
                yield document


def _replaced(items: list, index: int, item: Any) -> list:
    return [*items[:index], item, *items[index + 1 :]]


def open_text(sources: Sequence[str], split: str = "train", text_column: str = "text") -> TextStream:
    """Return the documents of all sources, streamed, with `text` and `domain`.

    Args:
        sources: Files (parquet, jsonl or json, txt with one document a file), folders, globs, and Hub datasets
            `org/name` or `org/name:config`.
        split: Split of a Hub dataset. In a folder, files named `*_train`, `*_validation` or `*_test` belong to that
            split, others to `train`; a file or glob is taken as it is.
        text_column: Column that holds the text. The domain is the column `domain` where there is one, else the name
            of the file without its split, or of the dataset.

    Raises:
        SettingsError: if a source is missing, of an unknown kind, empty, or has no such column.
    """
    if not sources:
        raise SettingsError("No text is given; name files, folders or Hub datasets.")
    opened = []
    for source in sources:
        if files := find_files(source, split):
            opened += [_open_file(file, text_column) for file in files]
        else:
            opened.append(_open_hub_dataset(source, split, text_column))
    streams, domains = zip(*opened, strict=True)
    return TextStream(streams, domains)


def find_files(source: str, split: str = "train") -> list[Path]:
    """Return the files that `source` names, sorted; none if it looks like a Hub dataset.

    Raises:
        SettingsError: if it is neither, or a file is of an unknown kind.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in LOADERS and _split_of(file) == split)
        if not files:
            raise SettingsError(f"{source}: no {split} text in this folder; files are {', '.join(LOADERS)}.")
        return files
    if path.is_file():
        files = [path]
    elif glob.has_magic(source):
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise SettingsError(f"{source}: no file matches this pattern.")
    elif _HUB_ID.match(source) and path.suffix not in LOADERS:
        return []
    else:
        raise SettingsError(
            f"{source}: no such file or folder, and not a Hub dataset like org/name or org/name:config."
        )
    for file in files:
        if file.suffix not in LOADERS:
            raise SettingsError(f"{file}: unknown kind of text file; known are {', '.join(LOADERS)}.")
    return files


def _split_of(file: Path) -> str:
    return next((split for split in SPLITS if file.stem.endswith(f"_{split}")), "train")


def _domain_of(file: Path) -> str:
    return re.sub(rf"_({'|'.join(SPLITS)})$", "", file.stem)


def _open_file(file: Path, text_column: str) -> tuple[IterableDataset, str | None]:
    loader = LOADERS[file.suffix]
    options = {"sample_by": "document"} if loader == "text" else {}
    column = "text" if loader == "text" else text_column
    try:
        rows = load_dataset(loader, data_files=str(file), split="train", streaming=True, **options)
        return _as_documents(rows, str(file), column, _domain_of(file))
    except SettingsError:
        raise
    # The loaders raise whatever the parser of the format raises.
    except Exception as error:
        raise SettingsError(f"{file}: not a readable {loader} file ({_first_line(error)}).") from error


def _open_hub_dataset(source: str, split: str, text_column: str) -> tuple[IterableDataset, str | None]:
    name, _, config = source.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split, streaming=True)
        return _as_documents(rows, source, text_column, name.split("/")[-1])
    except SettingsError:
        raise
    # The Hub client raises errors of many libraries: no such dataset, configuration, split, access or connection.
    except Exception as error:
        raise SettingsError(
            f"{source}: no such file or folder, and no {split} split to be read on the Hub ({_first_line(error)})."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _as_documents(
    rows: IterableDataset, source: str, text_column: str, domain: str
) -> tuple[IterableDataset, str | None]:
    """Return `rows` with the columns `text` and `domain` only, and the one domain of all, if they name none."""
    first = next(iter(rows), None)
    if first is None:
        raise SettingsError(f"{source}: there is no text in it.")
    if text_column not in first:
        raise SettingsError(f"{source}: no column {text_column!r}; its columns are {', '.join(map(repr, first))}.")
    if not isinstance(first[text_column], str | None):
        raise SettingsError(f"{source}: column {text_column!r} holds {type(first[text_column]).__name__}, not text.")

    def to_document(row: dict[str, Any]) -> dict[str, str]:
        return {"text": row[text_column] or "", "domain": row.get("domain") or domain}

    documents = rows.map(to_document, remove_columns=list(first), features=DOCUMENT_FEATURES)
    return documents, None if "domain" in first else domain


class PackedBlocks(torch.utils.data.IterableDataset):
    """Blocks of exactly `block_size` tokens, `{"input_ids": [S]}`, from documents joined by the end-of-text token.

    What a document leaves over begins the next block; the last, incomplete one is dropped. The position can be saved
    and restored exactly: see `state_dict`.

    Args:
        documents: Documents with a `text`; `state_dict` and `load_state_dict` save and restore its position.
        tokenizer: Its `eos_token` ends each document, if it has one.
        block_size: Tokens in a block.
        repeat: Start over at the end of the documents, without end.

    Attributes:
        max_read_ahead: A consumer that reads ahead saves an earlier position than the last one; any of the last so
            many blocks can be saved.
    """

    # Documents that are tokenized at a time: enough for the tokenizer's threads, few enough to start soon.
    DOCUMENTS_PER_BATCH = 32

    def __init__(
        self,
        documents: TextStream | IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        repeat: bool = False,
    ):
        if block_size < 1:
            raise SettingsError(f"block_size={block_size} must be at least 1.")
        self.documents = documents
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.repeat = repeat
        self.max_read_ahead = 256
        self.num_blocks = 0
        self._beginning = {"num_blocks": 0, "documents": None, "leftover": []}
        self._history = deque([self._beginning])
        self._start = {"num_blocks": 0, "batch": self._beginning}

    def state_dict(self, num_blocks: int | None = None) -> dict[str, Any]:
        """Return the position after `num_blocks` blocks, by default all that were read; it fits in JSON.

        It is the batch of documents in which the position lies, and what was left over before that batch.

        Raises:
            ValueError: if that position is not reached, or too far back to be remembered.
        """
        num_blocks = self.num_blocks if num_blocks is None else num_blocks
        earlier = [batch for batch in self._history if batch["num_blocks"] <= num_blocks]
        if not earlier or num_blocks > self.num_blocks:
            raise ValueError(f"The position after {num_blocks} blocks is not known; {self.num_blocks} were read.")
        return {"num_blocks": num_blocks, "batch": earlier[-1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin where `state` was taken."""
        self._start = state

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        start, self._start = self._start, {"num_blocks": 0, "batch": self._beginning}
        num_skipped = start["num_blocks"] - start["batch"]["num_blocks"]
        return islice(self._blocks_from(start["batch"]), num_skipped, None)

    def _blocks_from(self, batch: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
        """Yield the blocks from the beginning of a batch of documents on."""
        self._history.clear()
        self._history.append(batch)
        self.num_blocks = batch["num_blocks"]
        while True:
            self.documents.load_state_dict(batch["documents"])
            texts = (document["text"] for document in self.documents)
            while batch_of_texts := list(islice(texts, self.DOCUMENTS_PER_BATCH)):
                tokens = batch["leftover"] + self._tokenize(batch_of_texts)
                num_usable = len(tokens) - len(tokens) % self.block_size
                for begin in range(0, num_usable, self.block_size):
                    self.num_blocks += 1
                    yield {"input_ids": tokens[begin : begin + self.block_size]}
                batch = {
                    "num_blocks": self.num_blocks,
                    "documents": self.documents.state_dict(),
                    "leftover": tokens[num_usable:],
                }
                self._remember(batch)
            if not self.repeat:
                return
            logger.info("All documents were read; starting over after %d blocks.", self.num_blocks)
            batch = {**batch, "documents": self._beginning["documents"]}

    def _remember(self, batch: dict[str, Any]) -> None:
        """Add the beginning of a batch of documents, and forget those before any position that can be asked for."""
        if self._history[-1]["num_blocks"] == batch["num_blocks"]:
            # The batch between them completed no block.
            self._history.pop()
        self._history.append(batch)
        while len(self._history) > 1 and self._history[1]["num_blocks"] <= self.num_blocks - self.max_read_ahead:
            self._history.popleft()

    def _tokenize(self, texts: list[str]) -> list[int]:
        """Return the tokens of all documents, each with its end-of-text token."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [token for tokens in encoded["input_ids"] for token in chain(tokens, end)]


def pack_blocks(
    documents: TextStream | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    repeat: bool = False,
) -> PackedBlocks:
    """Return `documents` as blocks of `block_size` tokens; see [`PackedBlocks`]."""
    return PackedBlocks(documents, tokenizer, block_size, repeat)
