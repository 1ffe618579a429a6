"""Tokens of documents, cut into blocks of one size, from any position on.

Dimensions: S block size.
"""

import hashlib
import json
import multiprocessing
import queue
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .settings import SettingsError


logger = logging.get_logger(__name__)

# How long a position may be on its way from a worker whose block has arrived.
WORKER_TIMEOUT_S = 60


class TokenSource(Protocol):
    """Documents as lists of tokens, in an order that depends on nothing but what `describe` tells."""

    def __iter__(self) -> Iterator[Sequence[int]]:
        """Yield the tokens of each document from the loaded position on."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last document that was yielded; it fits in JSON."""

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Let the next iteration begin where `state` was taken, or with None at the beginning."""

    def describe(self) -> dict[str, Any]:
        """Return what the order depends on; it fits in JSON. A position means nothing where it differs."""


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text, and the end-of-text token behind them if the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [[*tokens, *end] for tokens in encoded["input_ids"]]


def beginning_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the beginning-of-text token, if the tokenizer by default puts it before a text, else nothing."""
    if tokenizer.bos_token_id is None:
        return []
    plain, default = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    is_added = default[:1] == [tokenizer.bos_token_id] != plain[:1]
    return [tokenizer.bos_token_id] if is_added else []


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, int | None]:
    """Return what decides which tokens a text becomes: the backend as JSON, where there is one, and the last token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return (tokenizer if backend is None else backend.to_str(), tokenizer.eos_token_id)


def digest(*parts: bytes) -> str:
    """Return a short text that is another one for other `parts`."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:12]


class TokenizedText:
    """A [`TokenSource`] that tokenizes documents as they are read.

    Args:
        documents: Documents with a `text`; see [`TextStream`].
        tokenizer: Its `eos_token` ends each document, if it has one.
        repeat: Start over at the end of the documents, without end.
    """

    # Documents that are tokenized at a time: enough for the tokenizer's threads, few enough to start soon.
    DOCUMENTS_PER_BATCH = 32

    def __init__(self, documents, tokenizer: PreTrainedTokenizerBase, repeat: bool = False):
        self.documents = documents
        self.tokenizer = tokenizer
        self.repeat = repeat
        self._state = self._beginning = {"documents": None, "num_taken": 0}

    def describe(self) -> dict[str, Any]:
        return {
            "num_texts": len(self.documents.sources),
            "texts": self.documents.describe(),
            "tokenizer": self._tokenizer_digest,
        }

    @cached_property
    def _tokenizer_digest(self) -> str:
        backend, end = tokenizer_identity(self.tokenizer)
        if not isinstance(backend, str):
            return digest(type(backend).__qualname__.encode(), repr(end).encode())
        # Whoever calls a tokenizer changes how it truncates and pads, and no call here does either.
        parts = {name: part for name, part in json.loads(backend).items() if name not in ("truncation", "padding")}
        return digest(json.dumps(parts, sort_keys=True).encode(), repr(end).encode())

    def state_dict(self) -> dict[str, Any]:
        """Return the position: where a batch of documents begins, and how many of them were yielded."""
        return self._state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._state = state or self._beginning

    def __iter__(self) -> Iterator[list[int]]:
        is_whole_pass = self._state == self._beginning
        while True:
            is_empty = True
            for tokens in self._one_pass():
                is_empty = is_empty and not tokens
                yield tokens
            if not self.repeat:
                return
            if is_empty and is_whole_pass:
                raise SettingsError("The text to train on has no tokens at all; give other files or datasets.")
            logger.info("All documents were read; starting over.")
            self._state, is_whole_pass = self._beginning, True

    def _one_pass(self) -> Iterator[list[int]]:
        begin, num_taken = self._state["documents"], self._state["num_taken"]
        self.documents.load_state_dict(begin)
        texts = (document["text"] for document in self.documents)
        while batch := list(islice(texts, self.DOCUMENTS_PER_BATCH)):
            end = self.documents.state_dict()
            tokens_of_documents = tokenize(self.tokenizer, batch)
            for number in range(num_taken, len(batch)):
                is_last = number + 1 == len(batch)
                self._state = {"documents": end if is_last else begin, "num_taken": 0 if is_last else number + 1}
                yield tokens_of_documents[number]
            begin, num_taken = end, 0


class BlockPacker:
    """Cuts documents, one after the other, into blocks of `block_size` tokens, and keeps what is left over.

    A block is `{"input_ids": [S]}`; with `document_mask` also `position_ids` [S], which start anew with each document,
    and with what a block holds of a document that the one before began: attention cannot reach back into that.
    """

    def __init__(self, block_size: int, document_mask: bool = False):
        if block_size < 1:
            raise SettingsError(f"block_size={block_size} must be at least 1.")
        self.block_size = block_size
        self.document_mask = document_mask
        self._begin_block()

    def _begin_block(self) -> None:
        self._input_ids: list[int] = []
        self._position_ids: list[int] = []

    def add(self, tokens: Sequence[int]) -> Iterator[tuple[dict[str, list[int]], int]]:
        """Yield each block that a document completes, and how many of its tokens are used up with it."""
        begin = 0
        while begin < len(tokens):
            taken = tokens[begin : begin + self.block_size - len(self._input_ids)]
            self._input_ids.extend(taken)
            self._position_ids.extend(range(len(taken)))
            begin += len(taken)
            if len(self._input_ids) == self.block_size:
                yield self._end_block(), begin

    def end(self) -> dict[str, list[int]] | None:
        """Return what is left over as a last block, a shorter one; None if nothing is."""
        return self._end_block() if self._input_ids else None

    def _end_block(self) -> dict[str, list[int]]:
        block = {"input_ids": self._input_ids}
        if self.document_mask:
            block["position_ids"] = self._position_ids
        self._begin_block()
        return block


class PackedBlocks(torch.utils.data.IterableDataset):
    """Blocks of exactly `block_size` tokens from documents one after the other; see [`BlockPacker`].

    What a document leaves over begins the next block; the last, incomplete one is dropped. The position can be saved
    and restored exactly: see `state_dict`.

    Args:
        source: Documents as tokens.
        block_size: Tokens in a block.
        document_mask: Whether blocks say where documents begin.

    Attributes:
        max_read_ahead: A consumer that reads ahead saves an earlier position than the last one; any of the last so
            many blocks can be saved.
    """

    def __init__(self, source: TokenSource, block_size: int, document_mask: bool = False):
        self.source = source
        self.block_size = block_size
        self.document_mask = document_mask
        self.max_read_ahead = 256
        self._start = self._beginning = {"num_blocks": 0, "source": None, "offset": 0}
        self._history = deque([self._beginning])
        self._from_worker: multiprocessing.Queue | None = None
        BlockPacker(block_size)

    def follow_worker(self) -> None:
        """Let positions be known here too when a worker of a `DataLoader` reads the blocks; before it is started."""
        self._from_worker = multiprocessing.Queue()

    def describe(self) -> dict[str, Any]:
        """Return what the blocks depend on, but for their size; it fits in JSON."""
        return {**self.source.describe(), "document_mask": self.document_mask}

    @property
    def num_blocks(self) -> int:
        """How many blocks were read."""
        return self._history[-1]["num_blocks"]

    def catch_up(self, num_blocks: int | None = None) -> None:
        """Take over what a worker has read, and wait for the position after `num_blocks`, whose block is here."""
        if self._from_worker is None:
            return
        while (num_blocks is not None and self.num_blocks < num_blocks) or not self._from_worker.empty():
            try:
                self._remember(self._from_worker.get(timeout=WORKER_TIMEOUT_S))
            except queue.Empty:
                return

    def state_dict(self, num_blocks: int | None = None) -> dict[str, Any]:
        """Return the position after `num_blocks` blocks, by default all that were read; it fits in JSON.

        It is the position of the document in which the next block begins, and the offset of the block in it.

        Raises:
            ValueError: if that position is not reached, or too far back to be remembered.
        """
        self.catch_up(num_blocks)
        num_blocks = self.num_blocks if num_blocks is None else num_blocks
        index = num_blocks - self._history[0]["num_blocks"]
        if not 0 <= index < len(self._history):
            raise ValueError(f"The position after {num_blocks} blocks is not known; {self.num_blocks} were read.")
        return self._history[index]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin where `state` was taken."""
        self._start = state

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        start, self._start = self._start, self._beginning
        self._remember(start)
        self.source.load_state_dict(start["source"])
        return self._blocks_from(start)

    def _blocks_from(self, start: dict[str, Any]) -> Iterator[dict[str, list[int]]]:
        packer = BlockPacker(self.block_size, self.document_mask)
        before, offset = start["source"], start["offset"]
        for tokens in self.source:
            after = self.source.state_dict()
            for block, num_used in packer.add(tokens[offset:]):
                num_used += offset
                source, begin = (after, 0) if num_used == len(tokens) else (before, num_used)
                self._remember({"num_blocks": self.num_blocks + 1, "source": source, "offset": begin})
                yield block
            before, offset = after, 0

    def _remember(self, position: dict[str, Any]) -> None:
        if position["num_blocks"] != self.num_blocks + 1:
            # Reading begins somewhere else.
            self._history.clear()
        self._history.append(position)
        while len(self._history) > self.max_read_ahead + 1:
            self._history.popleft()
        if self._from_worker is not None and torch.utils.data.get_worker_info() is not None:
            # A worker does not wait at its end for somebody to ask.
            self._from_worker.cancel_join_thread()
            self._from_worker.put(position)
