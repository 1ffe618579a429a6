import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.overoptimization.samples import SampleTable, read_samples
from upcycled_moe.overoptimization.score_table import TABLE_FILE, ScoreTable


DIALOGUE = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "why?"},
]
ROWS = [
    {"prompt": "one", "responses": ["a", "b"], "human": [0.5, 1]},
    {"prompt": DIALOGUE, "responses": ["c", ""], "human": [2, 3]},
]
FACTS = {"checkpoint": {"sha256": "0" * 64}, "max_length": 8, "dtype": "auto"}


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def samples(tmp_path):
    return read_samples(write_rows(tmp_path / "samples.jsonl", ROWS))


def test_texts_and_dialogues_are_prompts(samples):
    assert samples.shape == (2, 2)
    assert samples.conversations() == [
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": "b"}],
        [*DIALOGUE, {"role": "assistant", "content": "c"}],
        [*DIALOGUE, {"role": "assistant", "content": ""}],
    ]
    np.testing.assert_array_equal(samples.columns["human"], [[0.5, 1], [2, 3]])
    assert set(samples.columns) == {"human"}


def test_a_row_ends_at_its_newline_only(tmp_path):
    responses = ["one\u2028line", "\x85", "a\x0cb"]
    line = json.dumps({"prompt": "x", "responses": responses}, ensure_ascii=False)
    path = tmp_path / "samples.jsonl"
    path.write_bytes(f"{line}\r\n{line}".encode())
    assert read_samples(path).responses == [responses] * 2


def test_parquet_says_the_same(tmp_path, samples):
    rows = [{**row, "prompt": prompt} for row, prompt in zip(ROWS, samples.prompts, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "samples.parquet")
    assert read_samples(tmp_path / "samples.parquet").sha256 == samples.sha256


def test_other_responses_are_another_table(samples):
    other = SampleTable(samples.prompts, [["a", "b"], ["c", "d"]], {})
    assert other.sha256 != samples.sha256


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "one"}] * 2, "no column 'responses'; its columns are 'prompt'."),
        ([{"responses": ["a"]}] * 2, "no column 'prompt'"),
        (ROWS[:1], "has 1 prompts; give 2 at least"),
        ([], "has 0 prompts; give 2 at least"),
        ([ROWS[0], {"prompt": "x", "responses": ["a"]}], "row 1 has 1 responses and row 0 has 2"),
        ([{"prompt": "x", "responses": ["a"]}] * 2, "there is nothing to choose from"),
        ([ROWS[0], {"prompt": "x", "responses": "ab"}], "row 1: 'responses' is no list of texts"),
        ([ROWS[0], {"prompt": "x", "responses": ["a", None]}], "row 1: 'responses' is no list of texts"),
        ([ROWS[0], {"prompt": 1, "responses": ["a", "b"]}], "row 1: 'prompt' is neither a text nor messages"),
        ([ROWS[0], {"prompt": DIALOGUE[:3], "responses": ["a", "b"]}], "row 1: 'prompt' .* await an answer"),
        ([ROWS[0], {"prompt": [], "responses": ["a", "b"]}], "row 1: 'prompt' is neither"),
        ([ROWS[0], ["x"]], "a line is no JSON object"),
        ([ROWS[0], {"prompt": "x", "responses": ["a", "\ud800"]}], "row 1: 'responses' has half a character"),
        ([ROWS[0], {"prompt": "\ud800", "responses": ["a", "b"]}], "row 1: 'prompt' has half a character"),
    ],
)
def test_files_that_are_no_samples(tmp_path, rows, message):
    path = write_rows(tmp_path / "samples.jsonl", rows)
    with pytest.raises(SettingsError, match=message) as raised:
        read_samples(path)
    assert str(raised.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("samples.csv", "prompt", "unknown kind of file"),
        ("samples.jsonl", "{", "cannot be read"),
        ("samples.parquet", "PAR1", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SettingsError, match=message):
        read_samples(tmp_path / name)


def test_scores_are_kept_by_what_they_were_made_with(tmp_path, samples):
    path, scores = tmp_path / TABLE_FILE, np.array([[0.1, 1e-9], [-3.0, 1 / 3]])
    ScoreTable(samples, path).add(FACTS, scores)
    again = ScoreTable(samples, path, [path])
    np.testing.assert_array_equal(again.get(FACTS), scores)
    assert again.get(FACTS | {"max_length": 9}) is None
    assert again.get(FACTS | {"checkpoint": {"sha256": "1" * 64}}) is None


def test_the_table_can_be_read_as_samples(tmp_path, samples):
    path = tmp_path / TABLE_FILE
    table = ScoreTable(samples, path)
    table.add(FACTS, np.array([[1.0, 2.0], [3.0, 4.0]]))
    read = read_samples(path)
    assert (read.sha256, read.origin) == (samples.sha256, {"file": "samples.jsonl"})
    np.testing.assert_array_equal(read.columns["human"], samples.columns["human"])
    np.testing.assert_array_equal(read.columns[table.column(FACTS)], [[1, 2], [3, 4]])
    elsewhere = ScoreTable(read, tmp_path / "other.parquet", [path])
    np.testing.assert_array_equal(elsewhere.get(FACTS), [[1, 2], [3, 4]])


def test_scores_of_other_samples_are_not_taken(tmp_path, samples):
    path = tmp_path / TABLE_FILE
    ScoreTable(samples, path).add(FACTS, np.zeros((2, 2)))
    other = SampleTable(samples.prompts, [["a", "b"], ["c", "d"]], {})
    assert ScoreTable(other, path, [path]).get(FACTS) is None


def test_a_write_that_fails_loses_no_score(tmp_path, samples, monkeypatch):
    path = tmp_path / TABLE_FILE
    table = ScoreTable(samples, path)
    table.add(FACTS, np.ones((2, 2)))
    before = path.read_bytes()

    def fail(table, file):
        file.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="No space left"):
        table.add(FACTS | {"max_length": 9}, np.zeros((2, 2)))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if "scores" in file.name] == [TABLE_FILE]
