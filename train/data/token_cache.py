"""Text that is tokenized once, into the cache of `datasets`, and then read at random."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from datasets.fingerprint import Hasher
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from ...common.packing import digest, tokenize, tokenizer_identity
from ...common.settings import SettingsError
from ...common.text import DOMAIN_COLUMN, check_columns, first_line
from ...common.text_files import TextPlace, find_text, how_to_load


TOKEN_FEATURES = Features({"input_ids": List(Value("int32")), "domain": Value("string")})
# Enough for the tokenizer's threads; a batch of long documents still fits into memory.
DOCUMENTS_PER_BATCH = 100


class CachedTokens:
    """A [`TokenSource`] of documents that are tokenized already, without end.

    Args:
        documents: The `input_ids` of all documents.
        rows: Which of them, in order.
        seed: Of the order, which is another one in each pass; None for that of `rows`.
    """

    # Documents that are read at a time.
    DOCUMENTS_PER_BATCH = 32
    # Documents whose tokens `describe` looks at, besides the lengths of all: few enough to read from a slow disk.
    MAX_DOCUMENTS_IN_DIGEST = 256

    def __init__(self, documents: Dataset, rows: np.ndarray, seed: int | None):
        self.documents = documents.with_format("numpy", columns=["input_ids"])
        self.rows = rows
        self.seed = seed
        self._state = self._beginning = {"epoch": 0, "num_taken": 0}

    def describe(self) -> dict[str, Any]:
        return {
            "streaming": False,
            "num_documents": len(self.rows),
            "shuffle_seed": self.seed,
            "tokens": self._token_digest,
        }

    @cached_property
    def _token_digest(self) -> str:
        """Follows from the tokens, so from files, split, column and tokenizer alike, but not from where files are."""
        lengths = pyarrow.compute.list_value_length(self.documents.data.column("input_ids")).to_numpy()
        step = -(-len(self.rows) // self.MAX_DOCUMENTS_IN_DIGEST)
        sample = self.documents[self.rows[:: max(step, 1)]]["input_ids"]
        tokens = (np.asarray(document, dtype="<i4").tobytes() for document in sample)
        return digest(lengths[self.rows].astype("<i8").tobytes(), *tokens)

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the pass over the documents, and how many of them were yielded in it."""
        return self._state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._state = state or self._beginning

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            epoch, num_taken = self._state["epoch"], self._state["num_taken"]
            rows, is_empty = self._rows_in_order(epoch), num_taken == 0
            for begin in range(num_taken, len(rows), self.DOCUMENTS_PER_BATCH):
                batch = self.documents[rows[begin : begin + self.DOCUMENTS_PER_BATCH]]["input_ids"]
                for number, tokens in enumerate(batch, start=begin + 1):
                    self._state = {"epoch": epoch, "num_taken": number}
                    is_empty = is_empty and not len(tokens)
                    yield tokens.tolist()
            if is_empty:
                raise SettingsError("The text to train on has no tokens at all; give other files or datasets.")
            self._state = {"epoch": epoch + 1, "num_taken": 0}

    def _rows_in_order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return self.rows
        # NumPy promises this stream for all of its versions, unlike that of `Generator.permutation`.
        keys = np.random.PCG64([self.seed, epoch]).random_raw(len(self.rows))
        return self.rows[np.argsort(keys, kind="stable")]


def tokenized_text(
    sources: Sequence[str],
    split: str,
    text_column: str,
    tokenizer: PreTrainedTokenizerBase,
    num_workers: int | None = None,
) -> Dataset:
    """Return `input_ids` and `domain` of all documents of `sources`, from the cache if they are there already.

    They are in the order of the sources, named as with [`open_text`]. The cache is that of `datasets`
    (HF_DATASETS_CACHE); a file that changed, another tokenizer or another column is tokenized anew. Of several
    processes one does it, and the others wait for it; what is cut short is never used.

    Args:
        num_workers: Processes to tokenize in; by default this one, with the tokenizer's own threads.

    Raises:
        SettingsError: if a source is missing, of an unknown kind, empty, not readable, or has no such column.
        OSError: if the cache cannot be written.
    """
    tokenized = []
    for place in find_text(sources, split):
        try:
            with FileLock(_lock_file(place.name, split)):
                tokenized.append(_tokenized(place, split, text_column, tokenizer, num_workers))
        except SettingsError:
            raise
        # The loaders raise whatever the parser of the format, the Hub's client or the disk raises, and wrap it.
        except Exception as error:
            reason = error.__cause__ or error
            if isinstance(reason, OSError):
                raise OSError(
                    f"{place.name}: cannot be tokenized into {datasets.config.HF_DATASETS_CACHE} "
                    f"({first_line(reason)})."
                ) from error
            raise SettingsError(f"{place.name}: cannot be read to its end ({first_line(reason)}).") from error
    return concatenate_datasets(tokenized)


def _lock_file(name: str, split: str) -> Path:
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    return cache / f"tokenized_text_{Hasher.hash((name, split))}.lock"


def _tokenized(
    place: TextPlace,
    split: str,
    text_column: str,
    tokenizer: PreTrainedTokenizerBase,
    num_workers: int | None,
) -> Dataset:
    """Return the tokens of one file or dataset."""
    if place.file is None:
        dataset, _, config = place.name.partition(":")
        rows = load_dataset(dataset, config or None, split=split)
    else:
        loader, options, text_column = how_to_load(place.file, text_column)
        rows = load_dataset(loader, data_files=str(place.file), split="train", **options)
    check_columns(rows[0] if len(rows) else None, place.name, text_column)

    def to_tokens(batch: dict[str, list]) -> dict[str, list]:
        texts = batch[text_column]
        domains = batch.get(DOMAIN_COLUMN, [None] * len(texts))
        return {
            "input_ids": tokenize(tokenizer, [text or "" for text in texts]),
            "domain": [one or place.domain for one in domains],
        }

    # Its own fingerprint of the function would hash the tokenizer with what its calls leave behind in it.
    identity = (rows._fingerprint, tokenizer_identity(tokenizer), text_column, place.domain)
    return rows.map(
        to_tokens,
        batched=True,
        batch_size=DOCUMENTS_PER_BATCH,
        num_proc=num_workers,
        remove_columns=rows.column_names,
        features=TOKEN_FEATURES,
        load_from_cache_file=True,
        new_fingerprint=Hasher.hash(identity),
        desc=f"Tokenizing {place.name}",
    )


def rows_by_domain(documents: Dataset) -> dict[str, np.ndarray]:
    """Return which rows of `documents` are of each domain."""
    names, numbers = np.unique(np.asarray(documents["domain"][:]), return_inverse=True)
    return {str(name): np.flatnonzero(numbers == number) for number, name in enumerate(names)}
