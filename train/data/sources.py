"""The training text, from its settings to blocks: streamed or tokenized once, with weights for its domains or not."""

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...common.packing import PackedBlocks, TokenizedText, TokenSource
from ...common.settings import SettingsError
from ...common.text import open_text
from ..arguments import DataArguments
from .mixture import TokenMixture, streams_by_domain, used_weights
from .token_cache import CachedTokens, rows_by_domain, tokenized_text


def training_blocks(data_args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> PackedBlocks:
    """Return the training text as blocks, without end.

    Args:
        seed: Of the order of documents, where they are shuffled.

    Raises:
        SettingsError: if the text cannot be read, or settings exclude each other.
    """
    source = _streamed(data_args, tokenizer) if data_args.streaming else _cached(data_args, tokenizer, seed)
    return PackedBlocks(source, data_args.block_size, data_args.document_mask)


def _streamed(data_args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> TokenSource:
    for name in ("shuffle_documents", "preprocessing_num_workers"):
        if (value := getattr(data_args, name)) is not None and value is not False:
            raise SettingsError(f"{name}={value} needs streaming=false: streamed text is read in the order it has.")
    documents = open_text(data_args.train_data, data_args.train_split, data_args.text_column)
    if data_args.domain_weights is None:
        return TokenizedText(documents, tokenizer, repeat=True)
    domains = streams_by_domain(documents)
    weights = used_weights(data_args.domain_weights, domains)
    return TokenMixture({name: TokenizedText(domains[name], tokenizer, repeat=True) for name in weights}, weights)


def _cached(data_args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> TokenSource:
    documents = tokenized_text(
        data_args.train_data,
        data_args.train_split,
        data_args.text_column,
        tokenizer,
        data_args.preprocessing_num_workers,
    )
    shuffle_seed = None if data_args.shuffle_documents is False else seed
    if data_args.domain_weights is None:
        return CachedTokens(documents, np.arange(len(documents)), shuffle_seed)
    rows = rows_by_domain(documents)
    weights = used_weights(data_args.domain_weights, rows)
    return TokenMixture({name: CachedTokens(documents, rows[name], shuffle_seed) for name in weights}, weights)
