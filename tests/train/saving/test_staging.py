"""What is cut short anywhere loads as before or not at all, and can be finished."""

import json
import os

import pytest

from upcycled_moe.train.saving import staging
from upcycled_moe.train.saving.staging import (
    MODEL_FOLDER,
    STAGING_FOLDER,
    clear_leftovers,
    finish_moving_model,
    keep_newest,
    publish_folder,
    publish_model,
)


class _CutShortError(Exception):
    pass


@pytest.fixture
def cut_short(monkeypatch):
    """`cut_short(n)`: the n-th change of a name from now on does not happen, nor what would come after it."""

    def cut(num_changes):
        count = iter(range(num_changes))

        def guarded(original):
            def change(*args, **kwargs):
                if next(count, None) is None:
                    raise _CutShortError
                return original(*args, **kwargs)

            return change

        monkeypatch.setattr(staging.os, "replace", guarded(os.replace))
        monkeypatch.setattr(staging.Path, "unlink", guarded(staging.Path.unlink))
        monkeypatch.setattr(staging.shutil, "rmtree", guarded(staging.shutil.rmtree))

    yield cut
    monkeypatch.undo()


OLD = {
    "config.json": "old",
    "model-1-of-2.safetensors": "old",
    "model-2-of-2.safetensors": "old",
    "model.safetensors.index.json": "old",
}
NEW = {"config.json": "new", "model.safetensors": "new", "tokenizer.json": "new", "trainer_state.json": "new"}


def _write(folder, files):
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def _read(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("num_changes", range(10))
def test_a_model_whose_move_is_cut_short_does_not_load_and_is_moved_later(
    tmp_path, cut_short, monkeypatch, num_changes
):
    output_dir = tmp_path / "out"
    _write(output_dir, OLD)
    _write(output_dir / STAGING_FOLDER / MODEL_FOLDER, NEW)
    cut_short(num_changes)
    try:
        publish_model(output_dir)
    except _CutShortError:
        pass
    else:
        assert num_changes == 9
    monkeypatch.undo()

    files = _read(output_dir)
    assert files in (OLD, NEW) or "config.json" not in files
    finish_moving_model(output_dir)
    clear_leftovers(output_dir)
    # Cut short before all of it was known to be whole, the old model stays.
    assert _read(output_dir) == (OLD if num_changes == 0 else NEW)
    assert list(output_dir.iterdir()) == [path for path in output_dir.iterdir() if path.is_file()]


def test_a_folder_takes_the_place_of_one_with_its_name(tmp_path):
    staged, folder = tmp_path / STAGING_FOLDER / "checkpoint-1", tmp_path / "checkpoint-1"
    _write(folder, {"weights": "broken", "other": "left"})
    _write(staged, {"weights": "whole"})
    publish_folder(staged, folder)
    assert _read(folder) == {"weights": "whole"}
    assert list(tmp_path.iterdir()) == [folder]


def test_old_checkpoints_go_in_the_order_they_were_written(tmp_path):
    folders = [tmp_path / f"checkpoint-{step}" for step in (9, 10, 11, 4)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        os.utime(folder, (number, number))
    keep_newest(sorted(folders), 2, protected={folders[0], folders[3]})
    assert set(tmp_path.iterdir()) == {folders[0], folders[3]}
    keep_newest([folders[0], folders[3]], 1, protected={folders[3]})
    assert set(tmp_path.iterdir()) == {folders[3]}


def test_a_removal_that_is_cut_short_leaves_nothing_under_the_name_of_a_checkpoint(tmp_path, cut_short, monkeypatch):
    folder = tmp_path / "checkpoint-1"
    _write(folder, {"weights": json.dumps(1)})
    cut_short(1)
    with pytest.raises(_CutShortError):
        staging.discard(folder)
    assert not folder.exists()
