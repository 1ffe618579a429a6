"""Evaluation blocks: the same as packing each domain alone, and no more text is read than they take."""

import json

import pytest

from upcycled_moe.common.text import TextSource, TextStream, open_text, pack_blocks
from upcycled_moe.train.data import blocks_by_domain


class _CountingStream:
    """Documents of one text, which counts how many were read."""

    def __init__(self, documents):
        self.documents, self.num_read = documents, 0

    def __iter__(self):
        for document in self.documents:
            self.num_read += 1
            yield document


def _documents(domain, texts):
    return _CountingStream([{"text": text, "domain": domain} for text in texts])


@pytest.mark.parametrize("max_blocks", [1, 3, None])
def test_each_domain_is_packed_as_if_alone(text_folder, tokenizer, max_blocks):
    files = sorted(map(str, text_folder.glob("*_validation.*")))
    found = blocks_by_domain(open_text(files), tokenizer, 64, max_blocks)

    assert sorted(found) == ["detective", "fiction", "travel"]
    for file, (_, blocks) in zip(files, sorted(found.items()), strict=True):
        assert blocks == list(pack_blocks(open_text([file]), tokenizer, 64))[:max_blocks]


def test_a_text_of_one_domain_is_read_no_further_than_it_takes(tokenizer):
    long, short = _documents("long", ["some words " * 20] * 1000), _documents("short", ["a few words"] * 5)
    found = blocks_by_domain(
        TextStream([TextSource("1", long, "long"), TextSource("2", short, "short")]), tokenizer, 8, 2
    )

    assert [len(found[domain]) for domain in ("long", "short")] == [2, 2]
    assert long.num_read == 1
    assert short.num_read <= 5


def test_documents_that_name_their_domain_are_sorted_out(tmp_path, tokenizer):
    rows = [{"text": "words and words", "domain": domain} for domain in ("law", "law", "law", "art")]
    file = tmp_path / "mixed.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = blocks_by_domain(open_text([str(file)]), tokenizer, 4, 1)
    assert {domain: len(blocks) for domain, blocks in found.items()} == {"law": 1, "art": 1}
