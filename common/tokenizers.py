"""Tokenizers for small models that are trained from nothing."""

from collections.abc import Iterable

from transformers import Qwen2Tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Return Qwen's tokenizer, a byte-level BPE, trained anew on `texts`; `<|endoftext|>` ends texts and pads.

    It is of Qwen's class, not a generic one: Transformers loads that class for a dense Qwen model whatever the files
    say, and for an upcycled one what they say, so that with any other the two would cut text into different tokens.

    Args:
        vocab_size: its tokens, that one and all bytes among them; fewer if the texts have no more.
    """
    return Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size, show_progress=False)
