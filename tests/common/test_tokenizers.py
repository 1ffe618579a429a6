"""Tokenizers are told apart by the tokens they make, not by their class."""

import json

import pytest
from dense_checkpoints import byte_level_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from upcycled_moe.common.tokenizers import has_vocabulary, tokenizer_difference, tokens_digest


def as_generic(change=lambda settings: None, **settings):
    """Return the sample tokenizer as one of the generic class, after `change` to its settings."""
    content = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())
    change(content)
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **names | settings)


def without_normalizer(content):
    content["normalizer"] = None


def with_prefix_space(content):
    content["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def with_swapped_tokens(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]


def with_swapped_rare_tokens(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["q"], vocabulary["z"] = vocabulary["z"], vocabulary["q"]


def without_last_merge(content):
    content["model"]["merges"].pop()


def test_the_class_makes_no_difference():
    assert type(as_generic()) is not type(byte_level_tokenizer())
    assert tokens_digest(as_generic()) == tokens_digest(byte_level_tokenizer())
    assert tokenizer_difference(byte_level_tokenizer(), as_generic()) is None


@pytest.mark.parametrize(
    "change",
    [without_normalizer, with_prefix_space, with_swapped_tokens, with_swapped_rare_tokens, without_last_merge],
)
def test_other_tokens_make_another_digest(change):
    assert tokens_digest(as_generic(change)) != tokens_digest(byte_level_tokenizer())


@pytest.mark.parametrize("change", [without_normalizer, with_prefix_space, with_swapped_tokens])
def test_other_tokens_are_shown(change):
    assert "becomes the tokens [" in tokenizer_difference(byte_level_tokenizer(), as_generic(change))


def test_decoding_is_compared_too():
    def decode_otherwise(content):
        content["decoder"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False}

    assert " become 't" in tokenizer_difference(byte_level_tokenizer(), as_generic(decode_otherwise))


def test_the_last_token_counts():
    other = as_generic()
    other.eos_token = None
    assert tokens_digest(other) != tokens_digest(as_generic())
    assert tokenizer_difference(as_generic(), other).startswith("texts end with token ")


def test_a_tokenizer_of_no_files_has_no_vocabulary():
    assert has_vocabulary(byte_level_tokenizer())
    assert not has_vocabulary(Qwen2Tokenizer())
