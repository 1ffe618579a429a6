"""Tokenizers: training one from nothing, and telling whether two cut text alike."""

import json
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from .packing import digest, tokenize


# Where tokenizers part that look the same: in spaces, capitals, digits, accents that can be written in two ways, ends
# of lines, and what is not Latin.
PROBES = (
    "two  spaces and   three",
    "It's HE'LL, (x+1)/2",
    "in 2024 and 1234567",
    "cafe\u0301, caf\u00e9",
    "one\n\n two\r\n\tthree \n",
    "\u4f60\u597d\uff0c\u4e16\u754c \u043f\u0440\u0438 \U0001f600",
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Return Qwen's tokenizer, a byte-level BPE, trained anew on `texts`; `<|endoftext|>` ends texts and pads.

    It is of Qwen's class, not a generic one: Transformers loads that class for a dense Qwen2 model whatever the files
    say. With any other, the tokenizer that was trained would cut text otherwise than the one that is loaded.

    Args:
        vocab_size: its tokens, that one and all bytes among them; fewer if the texts have no more.
    """
    return Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size, show_progress=False)


def has_vocabulary(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether `tokenizer` has tokens besides the added ones; one that is loaded from no files has none."""
    return not tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys()


def tokens_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a short text that is the same for tokenizers that make the same tokens of a text, whatever their class.

    It stands for the vocabulary, the merges, and the tokens of `PROBES`, as documents and with what comes before them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    merges = None if backend is None else json.loads(backend.to_str())["model"].get("merges")
    probes = tokenize(tokenizer, PROBES), tokenizer(list(PROBES))["input_ids"]
    parts = (sorted(tokenizer.get_vocab().items()), merges, *probes)
    return digest(*(json.dumps(part).encode() for part in parts))


def tokenizer_difference(expected: PreTrainedTokenizerBase, actual: PreTrainedTokenizerBase) -> str | None:
    """Return a difference of `actual` from `expected` in encoding or decoding `PROBES` and special tokens, or None."""
    for text in (*PROBES, *expected.all_special_tokens):
        tokens, others = (tokenizer(text)["input_ids"] for tokenizer in (expected, actual))
        if tokens != others:
            return f"{text!r} becomes the tokens {others}, not {tokens}"
        decoded, other = (tokenizer.decode(tokens) for tokenizer in (expected, actual))
        if decoded != other:
            return f"the tokens of {text!r} become {other!r}, not {decoded!r}"
    if expected.eos_token_id != actual.eos_token_id:
        return f"texts end with token {actual.eos_token_id}, not {expected.eos_token_id}"
    return None
