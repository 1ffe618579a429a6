"""Which files are read, and which domain the place of each says."""

import os

import pytest

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.text_files import find_text


def _write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("some text")


def _domains(folder, *sources, split="train", whole_folders=False):
    """Return the domain of each file below `folder` that is found; sources are relative to it, but for datasets."""
    places = find_text([str(folder / source) for source in sources], split, whole_folders)
    return {str(place.file.relative_to(folder)): place.domain for place in places}


@pytest.mark.parametrize(
    ("sources", "domains"),
    [
        # Folders whose files are named by split only.
        (["math", "code"], {"math/validation.txt": "math", "code/validation.txt": "code"}),
        (["math"], {"math/validation.txt": "math"}),
        (["*/validation.txt"], {"code/validation.txt": "code", "math/validation.txt": "math"}),
        # Files of one name.
        (["*/part_1.txt"], {"code/part_1.txt": "code", "math/part_1.txt": "math"}),
        # One of a folder takes the others with it.
        (
            ["math/part_1.txt", "code/part_1.txt", "math/part_2.txt"],
            {"math/part_1.txt": "math", "code/part_1.txt": "code", "math/part_2.txt": "math"},
        ),
        # Without others of that name, files of one folder are told apart by name.
        (["math/part_1.txt", "math/part_2.txt"], {"math/part_1.txt": "part_1", "math/part_2.txt": "part_2"}),
        # Folders of one name.
        (
            ["new/math/part_1.txt", "old/math/part_1.txt"],
            {"new/math/part_1.txt": "new/math", "old/math/part_1.txt": "old/math"},
        ),
        (["new", "old"], {"new/math/validation.txt": "new/math", "old/math/validation.txt": "old/math"}),
        # A file that is named like another folder.
        (["math/validation.txt", "new/math.txt"], {"math/validation.txt": "math", "new/math.txt": "new"}),
        # Splits are not domains, as folders either.
        (["a/wiki_train.txt", "b/validation/wiki.txt"], {"a/wiki_train.txt": "a", "b/validation/wiki.txt": "b"}),
        (["a/wiki_train.txt", "a/wiki_test.txt"], {"a/wiki_train.txt": "wiki", "a/wiki_test.txt": "wiki"}),
        (
            ["split/train/part.txt", "split/test/part.txt"],
            {f"split/{one}/part.txt": "part" for one in ("train", "test")},
        ),
        (["split/train/train.txt"], {"split/train/train.txt": "split"}),
    ],
)
def test_files_of_different_folders_share_no_domain(tmp_path, sources, domains):
    _write(tmp_path, *domains)

    assert _domains(tmp_path, *sources, split="validation") == domains


def test_a_folder_may_be_named_in_any_way(tmp_path, monkeypatch):
    _write(tmp_path, "math/validation.txt")
    monkeypatch.chdir(tmp_path / "math")
    sources = [".", "../math", os.path.join("..", "math", "validation.txt")]

    assert [place.domain for place in find_text(sources, "validation")] == ["math"] * 3


@pytest.mark.parametrize(
    ("sources", "domains"),
    [
        (["org/wiki", "org/web:en"], ["wiki", "web"]),
        (["org/web:en", "org/web:de"], ["en", "de"]),
        (["org/web", "other/web"], ["org/web", "other/web"]),
        (["org/web", "org/web"], ["web", "web"]),
    ],
)
def test_different_datasets_share_no_domain(sources, domains):
    assert [place.domain for place in find_text(sources)] == domains


def test_a_folder_without_splits_may_be_read_whole(tmp_path):
    _write(tmp_path, "text/math/part_1.txt", "text/code.txt")
    domains = {"text/code.txt": "code", "text/math/part_1.txt": "math"}

    assert _domains(tmp_path, "text", split="validation", whole_folders=True) == domains
    assert _domains(tmp_path, "text", split="train") == domains
    with pytest.raises(SettingsError, match="no validation text in this folder, its files are of train; choose"):
        _domains(tmp_path, "text", split="validation")

    _write(tmp_path, "text/wiki_test.txt")
    with pytest.raises(SettingsError, match="its files are of test, train; choose that split"):
        _domains(tmp_path, "text", split="validation", whole_folders=True)


def test_a_folder_without_text_says_which_files_are(tmp_path):
    _write(tmp_path, "text/table.csv")

    with pytest.raises(SettingsError, match=r"text: no text in this folder; files are \.parquet"):
        _domains(tmp_path, "text")


def test_parts_of_a_split_named_as_on_the_hub_belong_to_it(tmp_path):
    parts = [f"text/validation-0000{part}-of-00002.parquet" for part in range(2)]
    _write(tmp_path, "text/train-00000-of-00001.parquet", *parts)
    _write(tmp_path, "domains/code_validation-00000-of-00001.parquet", "domains/math-00000-of-00001.txt")

    assert _domains(tmp_path, "text", split="validation", whole_folders=True) == dict.fromkeys(parts, "text")
    assert _domains(tmp_path, "domains", split="validation") == {
        "domains/code_validation-00000-of-00001.parquet": "code"
    }
    assert _domains(tmp_path, "domains") == {"domains/math-00000-of-00001.txt": "math"}
