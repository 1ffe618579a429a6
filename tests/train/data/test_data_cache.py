"""Text that is tokenized once: reused as it is, redone when it changed, never half, and in an order by seed."""

import json
import multiprocessing
import os
import signal
import threading
from contextlib import suppress
from itertools import islice

import numpy as np
import pytest
from datasets import Dataset

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.text import open_text
from upcycled_moe.train.arguments import DataArguments
from upcycled_moe.train.data.sources import training_blocks
from upcycled_moe.train.data.token_cache import CachedTokens, tokenized_text


class _Characters:
    """A tokenizer whose tokens are code points, and which tells of its calls in a file, for calls of other processes.

    `fails_at` and `killed_at` are texts at which it fails, or kills its process.
    """

    def __init__(self, calls, fails_at="", killed_at="", eos_token_id=0):
        self.calls, self.fails_at, self.killed_at, self.eos_token_id = calls, fails_at, killed_at, eos_token_id

    # Where a call waits for one of another process, which should never come.
    meeting = None

    def __call__(self, texts, **kwargs):
        if self.meeting is not None:
            with suppress(threading.BrokenBarrierError):
                self.meeting.wait(timeout=0.5)
        with open(self.calls, "a") as file:
            file.write(f"{os.getpid()} {len(texts)}\n")
        if self.fails_at and self.fails_at in texts:
            raise OSError(28, "No space left on device")
        if self.killed_at and self.killed_at in texts:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"input_ids": [[ord(character) for character in text] for text in texts]}

    def __getstate__(self):
        # What the cache takes for the tokenizer's identity.
        return {"eos_token_id": self.eos_token_id, "calls": self.calls}

    def __setstate__(self, state):
        self.__init__(**state)


@pytest.fixture
def calls(tmp_path_factory):
    return tmp_path_factory.mktemp("calls") / "calls"


def _num_tokenized(calls):
    """Return how many documents were tokenized since the last time."""
    if not calls.exists():
        return 0
    num_texts = sum(int(line.split()[1]) for line in calls.read_text().splitlines())
    calls.unlink()
    return num_texts


def _write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path / "math_train.jsonl", [f"m{number:03}" for number in range(250)])
    _write(tmp_path / "code.jsonl", ["", "größer 🐍", None, "x" * 500])
    return tmp_path


def _tokenized(folder, tokenizer, **kwargs):
    return tokenized_text([str(folder)], "train", "text", tokenizer, **kwargs)


def test_the_tokens_are_those_of_the_stream_and_are_made_once(folder, calls):
    tokens = _tokenized(folder, _Characters(calls))
    assert _num_tokenized(calls) == 254
    streamed = [[*map(ord, document["text"]), 0] for document in open_text([str(folder)])]
    assert sorted(tokens["input_ids"]) == sorted(streamed)
    assert tokens["domain"][:] == ["code"] * 4 + ["math"] * 250

    again = _tokenized(folder, _Characters(calls))
    assert _num_tokenized(calls) == 0
    assert again["input_ids"][:] == tokens["input_ids"][:]


def test_a_sub_folder_is_the_domain_of_its_files(tmp_path, calls):
    (tmp_path / "law").mkdir()
    _write(tmp_path / "law" / "part_1.jsonl", ["a"])
    _write(tmp_path / "code_train.jsonl", ["b"])
    assert _tokenized(tmp_path, _Characters(calls))["domain"][:] == ["code", "law"]


def test_what_changed_is_tokenized_anew_and_nothing_else(folder, calls):
    _tokenized(folder, _Characters(calls))
    _num_tokenized(calls)

    _write(folder / "code.jsonl", ["another"])
    assert len(_tokenized(folder, _Characters(calls))) == 251
    assert _num_tokenized(calls) == 1
    without_end = _tokenized(folder, _Characters(calls, eos_token_id=None))
    assert _num_tokenized(calls) == 251
    assert without_end["input_ids"][0] == [*map(ord, "another")]


def test_what_was_cut_short_is_never_used(folder, calls):
    """It fails in the second batch of a file, after the first was written."""
    with pytest.raises(OSError, match=r"math_train.jsonl: cannot be tokenized into .*No space left on device"):
        _tokenized(folder, _Characters(calls, fails_at="m150"))
    _num_tokenized(calls)

    assert len(_tokenized(folder, _Characters(calls))) == 254
    assert _num_tokenized(calls) == 250


def test_processes_tokenize_in_parallel_to_the_same_tokens(folder, calls):
    tokens = _tokenized(folder, _Characters(calls), num_workers=2)
    processes = {line.split()[0] for line in calls.read_text().splitlines()}
    assert len(processes) >= 2
    assert str(os.getpid()) not in processes
    _num_tokenized(calls)

    assert _tokenized(folder, _Characters(calls), num_workers=2)["input_ids"][:] == tokens["input_ids"][:]
    assert _num_tokenized(calls) == 0


def test_of_several_processes_one_tokenizes(folder, calls):
    context = multiprocessing.get_context("fork")
    tokenizer = _Characters(calls)
    tokenizer.meeting = context.Barrier(2)
    processes = [context.Process(target=_tokenized, args=(folder, tokenizer)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert _num_tokenized(calls) == 254


def test_a_process_that_is_killed_leaves_nothing_that_is_used(folder, calls):
    """It is killed in the second batch of a file, and holds the lock then."""
    tokenizer = _Characters(calls, killed_at="m150")
    process = multiprocessing.get_context("fork").Process(target=_tokenized, args=(folder, tokenizer))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # One file, and a batch and a half of the other.
    assert _num_tokenized(calls) == 204

    assert len(_tokenized(folder, _Characters(calls))) == 254
    assert _num_tokenized(calls) == 250


def test_a_broken_file_is_one_clear_error(folder, calls):
    with (folder / "math_train.jsonl").open("a") as file:
        file.write('{"text": "cut sh')
    with pytest.raises(SettingsError, match=r"math_train.jsonl: cannot be read to its end") as error:
        _tokenized(folder, _Characters(calls))
    assert "\n" not in str(error.value)


def _numbers(state=None, seed=0, num_documents=50):
    documents = Dataset.from_dict({"input_ids": [[number] for number in range(num_documents)]})
    source = CachedTokens(documents, np.arange(num_documents), seed)
    source.load_state_dict(state)
    return source


def _first(source, num):
    return [token for [token] in islice(source, num)]


def test_each_pass_has_every_document_once_in_an_order_of_its_own():
    order = _first(_numbers(), 100)
    assert sorted(order[:50]) == sorted(order[50:]) == list(range(50))
    assert order[:50] != order[50:]
    assert order[:50] != list(range(50))
    assert _first(_numbers(seed=1), 50) != order[:50]
    assert _first(_numbers(seed=None), 100) == [*range(50), *range(50)]


def test_the_order_of_a_seed_never_changes():
    """Checkpoints say where in this order they are."""
    assert _first(_numbers(seed=42, num_documents=10), 20) == [
        4,
        8,
        1,
        9,
        3,
        6,
        0,
        7,
        2,
        5,
        1,
        2,
        8,
        5,
        3,
        9,
        6,
        0,
        4,
        7,
    ]


def test_a_position_is_found_again_without_reading_what_is_before():
    order = _first(_numbers(), 120)
    for position in (0, 1, 49, 50, 51, 99, 100):
        source = _numbers()
        _first(source, position)
        state = json.loads(json.dumps(source.state_dict()))
        resumed = _numbers(state)
        assert _first(resumed, 10) == order[position : position + 10]


@pytest.mark.parametrize(
    ("name", "value"),
    [("shuffle_documents", True), ("preprocessing_num_workers", 2), ("preprocessing_num_workers", 0)],
)
def test_settings_of_the_cache_are_refused_for_streamed_text(folder, calls, name, value):
    data_args = DataArguments(train_data=[str(folder)], **{name: value})
    with pytest.raises(SettingsError, match=f"{name}={value} needs streaming=false"):
        training_blocks(data_args, _Characters(calls), seed=0)


@pytest.mark.parametrize("streaming", [True, False])
def test_text_without_a_token_is_an_error_and_no_endless_loop(tmp_path, calls, streaming):
    _write(tmp_path / "empty.jsonl", ["", ""])
    data_args = DataArguments(train_data=[str(tmp_path)], streaming=streaming)
    with pytest.raises(SettingsError, match="no tokens at all"):
        next(iter(training_blocks(data_args, _Characters(calls, eos_token_id=None), seed=0)))
