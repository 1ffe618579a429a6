import json
import shutil

import pytest
import torch

from upcycled_moe.common.checkpoint_names import NamedCheckpoint
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.overoptimization.identity import checkpoint_identity


def identity(folder):
    return checkpoint_identity(NamedCheckpoint("any", str(folder)))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "config.json").write_text("{}")
    return tmp_path / "rm"


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt"]
)
def test_other_weights_are_another_checkpoint(folder, name):
    seen = set()
    for value in (1.0, 2.0):
        torch.save(torch.tensor(value), folder / name)
        seen.add(identity(folder)["sha256"])
    assert len(seen) == 2


def test_place_cards_and_logs_do_not_matter(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(b"weights")
    before = identity(folder)
    for name in ("README.md", "trainer_state.json", "training_args.bin", "optimizer.pt", ".gitattributes"):
        (folder / name).write_text("other")
    (folder / "checkpoint-5").mkdir()
    assert identity(shutil.copytree(folder, tmp_path / "elsewhere")) == before
    (folder / "chat_template.jinja").write_text("another")
    assert identity(folder) != before


@pytest.mark.parametrize("other", [None, "training_args.bin", "optimizer.pt"])
def test_a_folder_without_weights_is_refused(folder, other):
    if other:
        (folder / other).write_bytes(b"no weights")
    with pytest.raises(SettingsError, match=r"rm: holds no weights \(.safetensors, .bin"):
        identity(folder)


def test_an_adapter_is_another_on_another_model(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(b"weights")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"changes")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    before = identity(adapter)
    (folder / "model.safetensors").write_bytes(b"others")
    assert identity(adapter) != before
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(SettingsError, match="does not name the model that it changes"):
        identity(adapter)
