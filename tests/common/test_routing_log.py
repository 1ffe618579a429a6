"""The file of a run's routing: whole lines, whatever happens while one is written."""

import errno
import io
import json
import math

import pytest

from upcycled_moe.common.routing_log import append_routing, cut_routing, read_routing


LAYERS = {1: {"load": [0.25, 0.75], "entropy": 0.123456789, "dead_experts": 0}, 12: {"load": [1.0, 0.0]}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "routing.jsonl"
    for step in (10, 20, 30):
        append_routing(path, step, 4096, LAYERS)
    return path


def _steps(path):
    return [entry["step"] for entry in read_routing(path)]


def test_lines_hold_what_was_logged(path):
    assert _steps(path) == [10, 20, 30]
    first = next(read_routing(path))
    assert first["num_tokens"] == 4096
    assert first["layers"]["1"] == {"load": [0.25, 0.75], "entropy": 0.123457, "dead_experts": 0}
    assert first["layers"]["12"] == {"load": [1.0, 0.0]}


def test_what_is_not_a_number_is_null(path):
    append_routing(path, 40, 1, {1: {"entropy": math.nan, "load": [math.inf]}})
    line = path.read_text().splitlines()[-1]
    assert json.loads(line, parse_constant=pytest.fail)["layers"] == {"1": {"entropy": None, "load": [None]}}


def test_lines_after_a_step_are_cut_and_half_a_line_too(path):
    with path.open("a") as file:
        file.write('{"step": 40, "lay')
    assert _steps(path) == [10, 20, 30]
    cut_routing(path, 20)
    append_routing(path, 25, 1, LAYERS)
    assert _steps(path) == [10, 20, 25]
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    cut_routing(path, 0)
    cut_routing(path, 0)
    assert not path.exists()
    assert _steps(path) == []


def test_a_full_disk_leaves_whole_lines(path, monkeypatch):
    def write_half(self, content):
        return io.FileIO.write(self, content[: len(content) // 2])

    def open_on_full_disk(self, mode, buffering):
        return type("FullFile", (io.FileIO,), {"write": write_half})(str(self), mode)

    monkeypatch.setattr(type(path), "open", open_on_full_disk)
    with pytest.raises(OSError, match="No space left") as error:
        append_routing(path, 40, 1, LAYERS)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    append_routing(path, 50, 1, LAYERS)
    assert _steps(path) == [10, 20, 30, 50]
