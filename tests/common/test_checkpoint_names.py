"""Names of checkpoints: as short as tells them apart."""

import pytest

from upcycled_moe.common.checkpoint_names import NamedCheckpoint, name_checkpoints
from upcycled_moe.common.settings import SettingsError


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["org/one"], ["one"]),
        (["org/one", "org/two"], ["one", "two"]),
        (["a/x/moe", "b/x/moe", "c/other"], ["a/x/moe", "b/x/moe", "other"]),
        (["short=org/one", "org/one"], ["short", "one"]),
        (["org/one@step1", "org/one@step2"], ["one@step1", "one@step2"]),
        (["run/checkpoint-5", "checkpoint-5"], ["run/checkpoint-5", "checkpoint-5"]),
    ],
)
def test_names_are_the_last_parts_that_tell_apart(arguments, names):
    assert [checkpoint.name for checkpoint in name_checkpoints(arguments)] == names


def test_folders_are_told_apart_by_where_they_are(tmp_path, monkeypatch):
    for name in ("a/moe", "b/moe"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "moe")
    checkpoints = name_checkpoints([".", "../../b/moe"])
    assert [checkpoint.name for checkpoint in checkpoints] == ["a/moe", "b/moe"]
    assert [checkpoint.path for checkpoint in checkpoints] == [".", "../../b/moe"]


def test_a_link_keeps_its_name(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "trained").symlink_to(tmp_path / "out")
    assert name_checkpoints([str(tmp_path / "trained")])[0].name == "trained"


def test_revisions_are_of_the_hub_only(tmp_path, monkeypatch):
    (tmp_path / "run@7").mkdir()
    monkeypatch.chdir(tmp_path)
    assert name_checkpoints(["run@7", "x=org/one@main"]) == [
        NamedCheckpoint("run@7", "run@7"),
        NamedCheckpoint("x", "org/one", "main"),
    ]


def test_a_folder_may_have_an_equals_sign_in_its_name(tmp_path):
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    assert name_checkpoints([str(folder)]) == [NamedCheckpoint("lr=0.1", str(folder))]
    assert name_checkpoints([f"x={folder}"]) == [NamedCheckpoint("x", str(folder))]


@pytest.mark.parametrize("arguments", [["org/one", "org/one"], ["x=a", "x=b"], ["x=a", "b/x"]])
def test_two_of_one_name_are_an_error(arguments):
    with pytest.raises(SettingsError, match=r"two checkpoints would be called '.+'; name them apart, as in first="):
        name_checkpoints(arguments)


@pytest.mark.parametrize("argument", ["", " ", "x=", "=x", " =x"])
def test_what_names_no_checkpoint_is_an_error(argument):
    with pytest.raises(SettingsError, match="give a checkpoint as PATH or NAME=PATH"):
        name_checkpoints([argument])
