"""Reading preference pairs of the forms that datasets have."""

import json

import pytest
import torch
from datasets import Dataset

from upcycled_moe.common.progress import Progress
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.preference.pairs import flipped, read_pairs
from upcycled_moe.preference.settings import PairSettings


def message(role, content):
    return {"role": role, "content": content}


QUESTION = message("user", "Why?")
GOOD, BAD = message("assistant", "Because."), message("assistant", "No.")
EARLIER = [message("system", "Be kind."), message("user", "Hi"), message("assistant", "Hello")]
# Rows of one pair each, and the prompt that they have.
FORMS = {
    "dialogue": (
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
        [QUESTION],
    ),
    "messages": ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, [QUESTION]),
    "several turns with a system message": (
        {"chosen": [*EARLIER, QUESTION, GOOD], "rejected": [*EARLIER, QUESTION, BAD]},
        [*EARLIER, QUESTION],
    ),
    "prompt of messages": (
        {"prompt": [*EARLIER, QUESTION], "chosen": [GOOD], "rejected": [BAD]},
        [*EARLIER, QUESTION],
    ),
    "prompt of text": ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, [QUESTION]),
    "prompt of text, answers as messages": ({"prompt": "Why?", "chosen": [GOOD], "rejected": [BAD]}, [QUESTION]),
    "prompt repeated as messages": (
        {"prompt": "Why?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        [QUESTION],
    ),
    "prompt repeated with other white space": (
        {"prompt": "Why?\n", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        [QUESTION],
    ),
    "prompt repeated after a system message": (
        {"prompt": "Why?", "chosen": [EARLIER[0], QUESTION, GOOD], "rejected": [EARLIER[0], QUESTION, BAD]},
        [EARLIER[0], QUESTION],
    ),
    "prompt repeated as a dialogue": (
        {
            "prompt": "\n\nHuman: Why?\n\nAssistant:",
            "chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
            "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
        },
        [QUESTION],
    ),
    "column with a system message": (
        {"system": "Be kind.", "prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        [EARLIER[0], QUESTION],
    ),
    "column with a system message that is repeated": (
        {"system": "Be kind. ", "chosen": [*EARLIER[:1], QUESTION, GOOD], "rejected": [*EARLIER[:1], QUESTION, BAD]},
        [EARLIER[0], QUESTION],
    ),
    "empty columns": (
        {"system": "", "prompt": "", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]},
        [QUESTION],
    ),
    "prompt as a dialogue up to the answer": (
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "Because.", "rejected": "No."},
        [QUESTION],
    ),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count, **others):
    return [{"prompt": f"Why {i}?", "chosen": f"good {i}", "rejected": f"bad {i}", **others} for i in range(count)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_conversation(form, tmp_path):
    row, prompt = FORMS[form]
    [pair] = read_pairs(PairSettings([write(tmp_path / "why_train.jsonl", [row])]))

    assert pair == {"prompt": prompt, "chosen": [GOOD], "rejected": [BAD], "source": "why"}


def test_parquet_is_read_too_and_a_source_column_names_the_source(tmp_path):
    Dataset.from_list(numbered(2, source="people")).to_parquet(tmp_path / "pairs.parquet")
    pairs = read_pairs(PairSettings([str(tmp_path / "pairs.parquet")]))

    assert pairs["source"] == ["people", "people"]
    assert pairs[1]["chosen"] == [message("assistant", "good 1")]


def test_an_answer_may_begin_as_its_prompt_does(tmp_path):
    row = {"prompt": "Hello", "chosen": "Hello! How are you?", "rejected": "Hello"}
    [pair] = read_pairs(PairSettings([write(tmp_path / "a.jsonl", [row])]))

    assert pair["prompt"] == [message("user", "Hello")]
    assert (pair["chosen"][0]["content"], pair["rejected"][0]["content"]) == ("Hello! How are you?", "Hello")


@pytest.mark.parametrize(
    ("column", "value"), [("prompt", "How?"), ("prompt", [*EARLIER, QUESTION]), ("system", "Be short.")]
)
def test_a_conversation_that_begins_otherwise_than_its_columns_say_is_refused(column, value, tmp_path):
    row = {column: value, "chosen": [EARLIER[0], QUESTION, GOOD], "rejected": [EARLIER[0], QUESTION, BAD]}
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(SettingsError, match=rf"a\.jsonl: row 1: 'chosen' does not begin with what '{column}' holds"):
        read_pairs(PairSettings([path]))


BAD_ROWS = {
    "no answer": {"chosen": "\n\nHuman: Why?", "rejected": "\n\nHuman: Why?"},
    "no prompt": {"chosen": "Because.", "rejected": "No."},
    "nothing": {"prompt": "Why?", "chosen": None, "rejected": "No."},
    "numbers": {"prompt": "Why?", "chosen": 1, "rejected": 2},
    "messages without a role": {"prompt": "Why?", "chosen": [{"content": "x"}], "rejected": [{"content": "y"}]},
    "content in parts": {
        "prompt": "Why?",
        "chosen": [{"role": "assistant", "content": [{"type": "text"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "image"}]}],
    },
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_row_that_is_no_pair_is_named(kind, tmp_path):
    path = write(tmp_path / "bad.jsonl", [BAD_ROWS[kind]])
    with pytest.raises(SettingsError, match=r"bad\.jsonl: row 1: 'chosen' is no prompt with an assistant's answer"):
        read_pairs(PairSettings([path]))


def test_the_number_of_the_row_is_said(tmp_path):
    path = write(tmp_path / "bad.jsonl", [*numbered(2), {"prompt": "Why?", "chosen": "Because.", "rejected": None}])
    with pytest.raises(SettingsError, match="row 3: 'rejected'"):
        read_pairs(PairSettings([path]))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("text.jsonl", '{"text": "a"}\n', r"no columns 'chosen' and 'rejected'; its columns are 'text'"),
        ("broken.jsonl", '{"chosen": "a"\n', "cannot be read as preference pairs"),
        ("empty.jsonl", "", "empty.jsonl"),
    ],
)
def test_files_of_something_else_are_refused_in_one_line(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(SettingsError, match=said) as error:
        read_pairs(PairSettings([str(tmp_path / name)]))
    assert "\n" not in str(error.value)


class Warnings(Progress):
    def __init__(self):
        self.messages = []

    def warn(self, message):
        self.messages.append(message)


def test_pairs_that_say_nothing_are_left_out_and_counted(tmp_path):
    same = {"prompt": "Why?", "chosen": "So.", "rejected": "So."}
    apart = {"chosen": [message("user", "A"), GOOD], "rejected": [message("user", "B"), BAD]}
    one, other = write(tmp_path / "a.jsonl", [*numbered(3), same]), write(tmp_path / "b.jsonl", [apart])
    warnings = Warnings()

    assert len(read_pairs(PairSettings([one, other]), warnings)) == 3
    assert "2 of 5 pairs are left out" in warnings.messages[0]
    with pytest.raises(SettingsError, match="no two answers to one prompt differ"):
        read_pairs(PairSettings([other]))


def test_no_more_is_read_than_max_pairs_takes(tmp_path):
    first = write(tmp_path / "a.jsonl", numbered(3))
    write(tmp_path / "b.jsonl", [{"prompt": "Why?", "chosen": None, "rejected": None}])
    warnings = Warnings()
    pairs = read_pairs(PairSettings([first, str(tmp_path / "b.jsonl")], max_pairs=3), warnings)

    assert pairs["source"] == ["a"] * 3
    [warning] = warnings.messages
    assert "first 3 pairs are taken, so 1 of the files or datasets are not read" in warning
    assert warning.endswith("b.jsonl.")
    read_pairs(PairSettings([first], max_pairs=3), warnings)
    assert len(warnings.messages) == 1


def test_reading_leaves_nothing_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    read_pairs(PairSettings([write(tmp_path / "a.jsonl", numbered(4))], flip_rate=0.5))
    assert not list((tmp_path / "cache").rglob("*.arrow"))


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 0), (0.25, 5), (1.0, 20)])
def test_a_share_of_the_pairs_is_flipped_the_same_for_the_same_seed(rate, expected, tmp_path):
    pairs = read_pairs(PairSettings([write(tmp_path / "a.jsonl", numbered(20))]))
    copies = [flipped(pairs, rate, torch.Generator().manual_seed(1)).to_list() for _ in range(2)]
    changed = [(row, new) for row, new in zip(pairs.to_list(), copies[0], strict=True) if row != new]

    assert copies[0] == copies[1]
    assert len(changed) == expected
    for row, new in changed:
        assert new == row | {"chosen": row["rejected"], "rejected": row["chosen"]}
