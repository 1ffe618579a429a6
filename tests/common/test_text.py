"""Streamed text: which files are read, in what order, and packing that loses no token and resumes anywhere."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.text import open_text, pack_blocks


class _Characters:
    """A tokenizer whose tokens are code points, so that expectations can be written down."""

    eos_token_id = 0

    def __call__(self, texts, **kwargs):
        return {"input_ids": [[ord(character) for character in text] for text in texts]}


def _write_jsonl(path, texts, **columns):
    path.write_text("".join(json.dumps({"text": text, **columns}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


@pytest.fixture
def two_files(tmp_path):
    return [
        _write_jsonl(tmp_path / "math_train.jsonl", [f"m{i}" for i in range(5)]),
        _write_jsonl(tmp_path / "code.jsonl", [f"c{i}" for i in range(2)]),
    ]


def test_files_take_turns_and_each_document_comes_once(two_files):
    documents = list(open_text(two_files))

    assert [document["text"] for document in documents] == ["m0", "c0", "m1", "c1", "m2", "m3", "m4"]
    assert {document["text"][0]: document["domain"] for document in documents} == {"m": "math", "c": "code"}


def test_a_domain_column_wins_over_the_file_name(tmp_path):
    file = _write_jsonl(tmp_path / "mixed.jsonl", ["x"], domain="law")

    assert list(open_text([file])) == [{"text": "x", "domain": "law"}]


def test_a_folder_gives_the_files_of_one_split(tmp_path):
    for name in ("a_train", "a_validation", "b"):
        _write_jsonl(tmp_path / f"{name}.jsonl", [name])

    assert [document["text"] for document in open_text([str(tmp_path)])] == ["a_train", "b"]
    assert [document["text"] for document in open_text([str(tmp_path)], "validation")] == ["a_validation"]


def test_sub_folders_are_domains(tmp_path):
    files = {
        "math/part_1.jsonl": "math",
        "math/deep/part_2_train.jsonl": "math",
        "train/code.jsonl": "code",
        "wiki/train.jsonl": "wiki",
        "book_train.jsonl": "book",
        "wiki/validation.jsonl": None,
        "validation/code.jsonl": None,
    }
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        _write_jsonl(tmp_path / name, [name])

    found = {document["text"]: document["domain"] for document in open_text([str(tmp_path)])}
    assert found == {name: domain for name, domain in files.items() if domain}
    found = {document["text"]: document["domain"] for document in open_text([str(tmp_path)], "validation")}
    assert found == {"wiki/validation.jsonl": "wiki", "validation/code.jsonl": "code"}
    assert [one["domain"] for one in open_text([str(tmp_path / "math" / "part_1.jsonl")])] == ["part_1"]


def test_a_column_that_is_named_must_be_there(tmp_path):
    subjects = tmp_path / "subjects.jsonl"
    rows = [{"text": "x", "subject": "law"}, {"text": "y", "subject": None}, {"text": "z", "subject": ""}]
    subjects.write_text("".join(json.dumps(row) + "\n" for row in rows))
    domains = [document["domain"] for document in open_text([str(subjects)], domain_column="subject")]
    assert domains == ["law", "subjects", "subjects"]
    other = _write_jsonl(tmp_path / "other.jsonl", ["w"])
    with pytest.raises(SettingsError, match=r"other.jsonl: no column 'subject'; its columns are 'text'"):
        open_text([str(subjects), other], domain_column="subject")


def test_a_domain_may_be_a_number(tmp_path):
    file = tmp_path / "labelled.jsonl"
    file.write_text('{"text": "x", "label": 0}\n{"text": "y", "label": 1}\n')
    assert [one["domain"] for one in open_text([str(file)], domain_column="label")] == ["0", "1"]


def test_txt_is_one_document_and_globs_are_expanded(tmp_path):
    (tmp_path / "one.txt").write_text("first\n\nsecond")
    (tmp_path / "two.txt").write_text("third")

    texts = [document["text"] for document in open_text([str(tmp_path / "*.txt")])]
    assert texts == ["first\n\nsecond", "third"]


@pytest.mark.parametrize("interrupted_after", range(8))
def test_documents_resume_after_any_of_them(two_files, interrupted_after):
    expected = list(open_text(two_files))
    stream = open_text(two_files)
    iterator = iter(stream)
    for _ in range(interrupted_after):
        next(iterator, None)
    state = json.loads(json.dumps(stream.state_dict()))

    resumed = open_text(two_files)
    resumed.load_state_dict(state)
    assert list(resumed) == expected[interrupted_after:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no such file"),
        ("table.csv", "a,b", "unknown kind"),
        ("empty.jsonl", "", ""),
        ("other.jsonl", '{"content": "x", "id": 1}\n', "no column 'text'; its columns are 'content', 'id'"),
        ("number.jsonl", '{"text": 5}\n', "holds int"),
        ("*.nothing", None, "no file matches"),
    ],
)
def test_unusable_sources_are_one_clear_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)

    with pytest.raises(SettingsError) as error:
        open_text([str(tmp_path / name)])
    assert name in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def _break_jsonl(path):
    with path.open("a") as file:
        file.write('{"text": "cut sh')


def _break_parquet(path):
    content = bytearray(path.read_bytes())
    # Into the pages of the last row group; the footer stays, so that the file opens.
    middle = len(content) * 2 // 3
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["broken.jsonl", "broken.parquet"])
def test_a_source_that_turns_out_broken_is_named(tmp_path, name):
    file = tmp_path / name
    # More than the reader of JSON takes at a time.
    texts = [random.Random(number).randbytes(1250).hex() for number in range(5000)]
    if name.endswith("jsonl"):
        _write_jsonl(file, texts)
        _break_jsonl(file)
    else:
        pq.write_table(pa.table({"text": texts}), file, row_group_size=500, use_dictionary=False, compression="zstd")
        _break_parquet(file)
    stream = open_text([_write_jsonl(tmp_path / "whole.jsonl", ["whole"]), str(file)])
    read = []
    with pytest.raises((SettingsError, OSError)) as error:
        read.extend(stream)
    assert len(read) > 1000
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_compressed_text_is_read(tmp_path):
    for compression in ("gzip", "zstd"):
        pq.write_table(pa.table({"text": [compression]}), tmp_path / f"{compression}.parquet", compression=compression)
    with gzip.open(tmp_path / "lines_train.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "größer 🐍"}) + "\n")
    documents = list(open_text([str(tmp_path)]))
    assert documents == [
        {"text": "gzip", "domain": "gzip"},
        {"text": "größer 🐍", "domain": "lines"},
        {"text": "zstd", "domain": "zstd"},
    ]


def test_documents_without_text_are_empty_documents(tmp_path):
    file = _write_jsonl(tmp_path / "some.jsonl", ["", None, "ab", ""])
    assert [block["input_ids"] for block in pack_blocks(open_text([file]), _Characters(), 3)] == [
        [0, 0, 97],
        [98, 0, 0],
    ]


def test_packing_loses_no_token_but_the_last_incomplete_block(two_files):
    stream = "".join(document["text"] + "\0" for document in open_text(two_files))
    blocks = ["".join(map(chr, block["input_ids"])) for block in pack_blocks(open_text(two_files), _Characters(), 4)]

    assert "".join(blocks) == stream[: len(blocks) * 4]
    assert len(stream) - 4 * len(blocks) < 4
    assert all(len(block) == 4 for block in blocks)


def test_a_tokenizer_without_end_of_text_joins_documents_directly(two_files):
    tokenizer = _Characters()
    tokenizer.eos_token_id = None

    assert "".join(map(chr, next(iter(pack_blocks(open_text(two_files), tokenizer, 4)))["input_ids"])) == "m0c0"


def test_repeating_carries_what_is_left_over_into_the_next_pass(two_files):
    stream = "".join(document["text"] + "\0" for document in open_text(two_files)) * 3
    blocks = iter(pack_blocks(open_text(two_files), _Characters(), 4, repeat=True))

    text = "".join("".join(map(chr, next(blocks)["input_ids"])) for _ in range(len(stream) // 4))
    assert text == stream[: len(text)]


@pytest.mark.parametrize("documents_per_batch", [1, 2, 32])
@pytest.mark.parametrize("read_ahead", [0, 1, 3])
def test_packing_resumes_at_any_block_however_far_the_reader_is_ahead(two_files, documents_per_batch, read_ahead):
    def packed():
        blocks = pack_blocks(open_text(two_files), _Characters(), 2, repeat=True)
        blocks.source.DOCUMENTS_PER_BATCH = documents_per_batch
        return blocks

    expected = [block for _, block in zip(range(40), packed(), strict=False)]
    for position in range(25):
        blocks = packed()
        iterator = iter(blocks)
        for _ in range(position + read_ahead):
            next(iterator)
        state = json.loads(json.dumps(blocks.state_dict(position)))

        resumed = packed()
        resumed.load_state_dict(state)
        assert [block for _, block in zip(range(10), resumed, strict=False)] == expected[position : position + 10]


def test_any_block_within_the_read_ahead_can_be_saved_however_short_the_documents(tmp_path):
    """Here 4000 documents lie between the position and the reader."""
    file = _write_jsonl(tmp_path / "short.jsonl", [f"{i:03}" for i in range(1000)])

    def packed():
        blocks = pack_blocks(open_text([file]), _Characters(), 40, repeat=True)
        blocks.source.DOCUMENTS_PER_BATCH, blocks.max_read_ahead = 1, 400
        return blocks

    blocks = packed()
    read = [block for _, block in zip(range(450), blocks, strict=False)]
    assert len(blocks._history) <= 401
    resumed = packed()
    resumed.load_state_dict(json.loads(json.dumps(blocks.state_dict(50))))
    assert next(iter(resumed)) == read[50]
    with pytest.raises(ValueError, match="position after 40 blocks is not known"):
        blocks.state_dict(40)


def test_a_position_not_reached_cannot_be_saved(two_files):
    blocks = pack_blocks(open_text(two_files), _Characters(), 4)

    with pytest.raises(ValueError, match="position after 3 blocks is not known"):
        blocks.state_dict(3)
