import errno
import os
import shutil
from pathlib import Path

import pytest
from partial_outputs import leave_partial

from upcycled_moe.common import output_folder
from upcycled_moe.common.output_folder import FolderKind, OutputError, staged


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_output_appears_only_when_all_went_well(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged(out) as folder:
        (folder / "file").write_text("new", encoding="utf-8")
        assert not out.exists()
    assert entries(tmp_path / "deep") == ["out"]
    assert (out / "file").read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_what_was_there(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").touch()

    def write_and_fail():
        with staged(out) as folder:
            (folder / "new").touch()
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert entries(tmp_path) == ["out"]
    assert entries(out) == ["config.json"]


def test_an_output_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").touch()
    replace = os.replace

    def fail_to_move_in(source, target):
        if Path(source) == tmp_path / "out.partial" / "out":
            raise OSError(errno.EIO, "no more")
        replace(source, target)

    monkeypatch.setattr(output_folder.os, "replace", fail_to_move_in)
    with pytest.raises(OSError, match="no more"), staged(out) as folder:
        (folder / "new").touch()
    assert entries(tmp_path) == ["out"]
    assert entries(out) == ["config.json"]


def test_leftovers_of_a_killed_run_are_cleared(tmp_path):
    leave_partial(tmp_path)
    with staged(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert entries(tmp_path) == ["out"]
    assert entries(tmp_path / "out") == ["whole"]


@pytest.mark.parametrize("fails", [False, True])
def test_an_old_output_that_was_moved_away_comes_back_first(tmp_path, fails):
    replaced = leave_partial(tmp_path) / "out.replaced"
    replaced.mkdir()
    (replaced / "config.json").touch()
    try:
        with staged(tmp_path / "out") as folder:
            assert entries(tmp_path / "out") == ["config.json"]
            (folder / "new").touch()
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert entries(tmp_path) == ["out"]
    assert entries(tmp_path / "out") == (["config.json"] if fails else ["new"])


def test_an_interruption_between_the_renames_brings_the_old_output_back(tmp_path, monkeypatch):
    """A signal is handled between any two statements, so no `try` around the second rename is enough."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").touch()
    replace, calls = os.replace, []

    def interrupt_after_the_first(source, target):
        replace(source, target)
        calls.append(target)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(output_folder.os, "replace", interrupt_after_the_first)
    with pytest.raises(KeyboardInterrupt), staged(out) as folder:
        (folder / "new").touch()
    assert entries(tmp_path) == ["out"]
    assert entries(out) == ["config.json"]


def test_an_output_that_appears_meanwhile_is_not_replaced_without_leave(tmp_path):
    staging = staged(tmp_path / "out", overwrite=False)
    folder = staging.__enter__()
    (folder / "new").touch()
    shutil.copytree(folder, tmp_path / "out")
    with pytest.raises(OutputError, match="exists and is not empty"):
        staging.__exit__(None, None, None)
    assert entries(tmp_path) == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target" / "upcycling.json").touch()
    with staged(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert entries(tmp_path / "target") == ["new"]


LETTERS = FolderKind("letter", ("letter.json",), frozenset({"to", "from"}), frozenset({"letter.json", "stamp.png"}))


@pytest.mark.parametrize(
    ("content", "other", "message"),
    [
        ('{"to": 1, "from": 2, "date": 3}', "stamp.png", None),
        ('{"to": 1}', "stamp.png", "holds no letter"),
        ('["to", "from"]', "stamp.png", "holds no letter"),
        ("{", "stamp.png", "holds no letter"),
        ('{"to": 1, "from": 2}', "diary", "holds diary, which is no part of the letter there"),
    ],
)
def test_only_a_folder_of_the_kind_and_with_nothing_else_is_replaced(tmp_path, content, other, message):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.json").write_text(content, encoding="utf-8")
    (out / other).touch()

    def write():
        with staged(out, kind=LETTERS) as folder:
            (folder / "new").touch()

    if message is None:
        write()
        assert entries(out) == ["new"]
    else:
        with pytest.raises(OutputError, match=message):
            write()
        assert entries(out) == sorted(["letter.json", other])
