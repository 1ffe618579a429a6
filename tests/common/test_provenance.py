"""The parent that a conversion recorded: known if it is here, and if it is the only one."""

import hashlib
import json

import pytest

from upcycled_moe.common.provenance import (
    installed_versions,
    read_provenance,
    recorded_parent,
    with_step,
    write_provenance,
)
from upcycled_moe.common.settings import SettingsError


@pytest.fixture
def parent(tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text("{}")
    return tmp_path / "dense"


def _record(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "upcycling.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def _source(parent, hashes=None):
    return {"source": {"name": str(parent), "sha256": hashes or {}}, "expert_sources": []}


def test_the_parent_is_found_from_the_checkpoint_and_from_those_of_a_run(parent, tmp_path):
    folder = _record(tmp_path / "moe", _source(parent))
    (folder / "checkpoint-5").mkdir()
    assert recorded_parent(folder) == recorded_parent(folder / "checkpoint-5")
    assert recorded_parent(folder).folder == str(parent)


def test_weights_that_changed_since_are_noticed(parent, tmp_path):
    first, second = parent / "model-1.safetensors", parent / "model-2.safetensors"
    hashes = {file.name: hashlib.sha256(file.name.encode()).hexdigest() for file in (first, second)}
    for file in (first, second):
        file.write_text(file.name)
    recorded = recorded_parent(_record(tmp_path / "moe", _source(parent, hashes)))

    assert recorded.changed_file() is None
    second.write_text("model-3.safetensors")
    assert recorded.changed_file() == second.name
    first.unlink()
    assert recorded.changed_file() == first.name


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        {"source": None},
        {"source": {"name": "org/dense", "sha256": {}}, "expert_sources": []},
        {"source": {"name": "PARENT", "sha256": []}, "expert_sources": []},
        {"source": {"name": "PARENT", "sha256": {}}, "expert_sources": [{"name": "other"}]},
    ],
)
def test_none_is_known_otherwise(parent, tmp_path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    assert recorded_parent(_record(tmp_path / "moe", text.replace("PARENT", str(parent)))) is None
    assert recorded_parent("org/no-folder") is None


def test_versions_are_those_of_the_packages():
    assert {"python", "torch", "transformers", "upcycled-moe"} <= installed_versions().keys()


def test_steps_are_added_in_their_order_and_change_nothing_before(tmp_path):
    conversion = {"source": {"name": "org/dense"}, "recipe": {"num_experts": 8}}
    pruned = with_step(conversion, "prune", num_experts=4)
    merged = with_step(pruned, "merge", method="average")
    write_provenance(tmp_path, merged)
    found = read_provenance(tmp_path)
    assert {name: found[name] for name in conversion} == conversion
    assert [(step["command"], step["versions"]) for step in found["steps"]] == [
        ("prune", installed_versions()),
        ("merge", installed_versions()),
    ]
    assert found["steps"][0]["num_experts"] == 4
    assert "steps" not in conversion
    assert len(pruned["steps"]) == 1


def test_a_checkpoint_without_provenance_begins_it_with_its_first_step():
    assert with_step(None, "export", to="mixtral")["steps"][0]["to"] == "mixtral"


def test_where_there_is_no_provenance_there_is_none(tmp_path):
    assert read_provenance(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list instead of an object"),
        ('{"steps": 3}', "steps=3 is no list of objects"),
        ('{"steps": ["export"]}', "is no list of objects"),
        ('{"recipe": 3}', "recipe=3 is no object"),
    ],
)
def test_damaged_provenance_is_an_error(tmp_path, content, message):
    (tmp_path / "upcycling.json").write_text(content)
    with pytest.raises(SettingsError, match=f"{message}.*; fetch it again, or remove it") as error:
        read_provenance(tmp_path)
    assert "\n" not in str(error.value)
