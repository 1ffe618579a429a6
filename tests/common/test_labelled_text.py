"""Blocks of text to look at: how much of each domain, how documents begin and end, and what is refused."""

import json
from array import array

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from upcycled_moe.common import labelled_text
from upcycled_moe.common.blocks import collate_blocks
from upcycled_moe.common.labelled_text import MAX_DOMAINS, labelled_blocks
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.text import TextSource, TextStream, open_text


BOS, EOS = 1, 2
VOCABULARY = {"<unk>": 0, "<s>": BOS, "</s>": EOS, **{f"w{number}": number for number in range(3, 40)}}


def _tokenizer(adds_bos, bos_token="<s>"):
    """A tokenizer with a token a word, `w3` is 3."""
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos_token, eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def rows(tmp_path):
    """`rows((text, domain), ...)` is a stream of these documents."""

    def write(*documents):
        file = tmp_path / "rows.jsonl"
        lines = (json.dumps({"text": text, "domain": domain}) + "\n" for text, domain in documents)
        file.write_text("".join(lines))
        return open_text([str(file)])

    return write


class _Counted:
    """Documents that count how many of them were read."""

    def __init__(self, documents):
        self.documents = documents
        self.num_read = 0

    def __iter__(self):
        for text, domain in self.documents:
            self.num_read += 1
            yield {"text": text, "domain": domain}


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        # As Mixtral's and Llama's: the token before each document is there to attend to, and not predicted.
        (_tokenizer(adds_bos=True), [BOS, 3, 4, EOS, BOS, 5, 6, EOS]),
        # A token that the tokenizer knows and does not add; and, as Qwen's, none.
        (_tokenizer(adds_bos=False), [3, 4, EOS, 5, 6, EOS]),
        (_tokenizer(adds_bos=False, bos_token=None), [3, 4, EOS, 5, 6, EOS]),
    ],
)
def test_a_document_begins_as_the_model_was_trained_to_see_it(rows, tokenizer, expected):
    (block,) = labelled_blocks(rows(("w3 w4", "a"), ("w5 w6", "a")), tokenizer, 16, 100)["a"]

    assert list(block["input_ids"]) == expected
    starts = [index for index, position in enumerate(block["position_ids"]) if position == 0]
    assert starts == [0, len(expected) // 2]
    labels = collate_blocks([block])["labels"][0].tolist()
    assert BOS not in labels
    assert labels.count(-100) == 2


@pytest.mark.parametrize("tokens_per_domain", [2, 5, 6, 7, 12, 13, 100])
@pytest.mark.parametrize("block_size", [3, 5, 100])
def test_the_first_tokens_of_each_domain_are_read(rows, tokens_per_domain, block_size):
    # 15 tokens of "a", 6 of "b", in turn as they come.
    documents = rows(*[("w3 w4", "a"), ("w5 w6", "b")] * 2, *[("w7 w8", "a")] * 3)
    found = labelled_blocks(documents, _tokenizer(adds_bos=False), block_size, tokens_per_domain)

    everything = {"a": [3, 4, EOS] * 2 + [7, 8, EOS] * 3, "b": [5, 6, EOS] * 2}
    assert list(found) == ["a", "b"]
    for name, blocks in found.items():
        assert [token for block in blocks for token in block["input_ids"]] == everything[name][:tokens_per_domain]
        assert all(len(block["input_ids"]) == block_size for block in blocks[:-1])
        assert all(len(block["input_ids"]) == len(block["position_ids"]) <= block_size for block in blocks)


def test_a_token_takes_few_bytes(rows):
    (block,) = labelled_blocks(rows(("w3 w4", "a")), _tokenizer(adds_bos=False), 8, 100)["a"]

    assert {values.itemsize for values in block.values()} == {4}
    assert isinstance(block["input_ids"], array)
    assert collate_blocks([block])["input_ids"].dtype == torch.int64


def test_text_without_end_is_read_until_nothing_is_added(monkeypatch, caplog):
    monkeypatch.setattr(labelled_text, "MAX_DOCUMENTS_IN_VAIN", 50)
    # A domain that comes late, but not too late, is seen.
    endless = _Counted(("w3 w4", "late" if number % 41 == 40 else "often") for number in range(1000))
    stream = TextStream([TextSource("web", endless, "often", has_domain_column=True)])
    found = labelled_blocks(stream, _tokenizer(adds_bos=False), 4, 6)

    assert {name: sum(len(block["input_ids"]) for block in blocks) for name, blocks in found.items()} == {
        "late": 6,
        "often": 6,
    }
    assert endless.num_read == 2 * 41 + 50
    assert [message.split(" documents")[0] for message in caplog.messages] == ["web: not read on after 50"]


def test_a_column_of_something_else_is_noticed_early():
    numbered = _Counted(("w3 w4", str(number)) for number in range(1000))
    stream = TextStream([TextSource("web", numbered, "0", has_domain_column=True)])

    with pytest.raises(SettingsError, match=rf"more than {MAX_DOMAINS} domains \('0', '1', '2', ...\)"):
        labelled_blocks(stream, _tokenizer(adds_bos=False), 4, 6)
    assert numbered.num_read == MAX_DOMAINS + 1


def test_documents_without_text_are_left_out(rows):
    (block,) = labelled_blocks(rows(("", "a"), ("w3 w4", "a"), (" ", "a")), _tokenizer(adds_bos=True), 16, 100)["a"]

    assert list(block["input_ids"]) == [BOS, 3, 4, EOS]


@pytest.mark.parametrize(
    ("text", "block_size", "tokens_per_domain", "message"),
    [
        ("", 16, 100, "domain 'b' has no tokens at all"),
        ("w3", 16, 100, "domain 'b' has no token that follows another"),
        ("w3 w4 w5", 1, 100, "has no token that follows another in its document; leave it out, or raise"),
        ("w3 w4 w5", 16, 1, "tokens_per_domain=1 must be at least 2"),
    ],
)
def test_text_of_which_nothing_can_be_said_is_refused(rows, text, block_size, tokens_per_domain, message):
    documents = rows(("w3 w4 w5", "c"), (text, "b"))
    with pytest.raises(SettingsError, match=message):
        labelled_blocks(documents, _tokenizer(adds_bos=False), block_size, tokens_per_domain)


def test_a_domain_with_less_text_than_asked_for_is_named(rows, caplog):
    documents = rows(*[("w3 w4", "long")] * 2, ("w5 w6", "short"))
    labelled_blocks(documents, _tokenizer(adds_bos=False), 4, 6)

    assert caplog.messages == ["Domains with fewer tokens than tokens_per_domain=6: 'short' 3."]
