"""Reading the feed-forward networks of a dense checkpoint."""

import pytest
import torch
from dense_checkpoints import write_dense
from safetensors.torch import load_file
from transformers import AutoModel

from upcycled_moe.analysis.parent import DenseParent
from upcycled_moe.common.settings import SettingsError


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_matrices_are_those_of_the_layer(tmp_path, max_shard_size):
    write_dense(tmp_path / "dense", max_shard_size=max_shard_size)
    is_sharded = len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    stored = {}
    for file in (tmp_path / "dense").glob("*.safetensors"):
        stored |= load_file(file)

    matrices = DenseParent(str(tmp_path / "dense")).feed_forward(1)

    assert is_sharded == (max_shard_size == "100KB")
    assert list(matrices) == ["gate", "up", "down"]
    for name, matrix in matrices.items():
        assert torch.equal(matrix, stored[f"model.layers.1.mlp.{name}_proj.weight"])


def test_a_layer_that_it_lacks_has_none(tmp_path):
    write_dense(tmp_path / "dense")

    assert DenseParent(str(tmp_path / "dense")).feed_forward(99) == {}


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="not a checkpoint in safetensors"):
        DenseParent(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", '{"metadata": {}}', '{"weight_map": 1}'])
def test_a_broken_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content, encoding="utf-8")

    with pytest.raises(SettingsError, match="not a checkpoint in safetensors"):
        DenseParent(str(tmp_path))


def test_a_missing_shard_is_refused(tmp_path):
    write_dense(tmp_path / "dense", max_shard_size="100KB")
    for file in (tmp_path / "dense").glob("*.safetensors"):
        file.unlink()

    with pytest.raises(SettingsError, match="cannot be read"):
        DenseParent(str(tmp_path / "dense"))


def test_any_broken_shard_is_refused_at_once(tmp_path):
    write_dense(tmp_path / "dense", max_shard_size="100KB")
    *_, last = sorted((tmp_path / "dense").glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-8])

    with pytest.raises(SettingsError, match=f"{last}: cannot be read"):
        DenseParent(str(tmp_path / "dense"))


def test_a_checkpoint_of_the_base_model_names_its_tensors_without_prefix(tmp_path):
    write_dense(tmp_path / "dense")
    AutoModel.from_pretrained(tmp_path / "dense").save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors").keys()

    whole, base = (DenseParent(str(tmp_path / name)).feed_forward(1) for name in ("dense", "base"))

    assert "layers.1.mlp.gate_proj.weight" in names
    assert all(torch.equal(base[matrix], whole[matrix]) for matrix in ("gate", "up", "down"))


def test_a_layer_fits_by_the_shapes_of_its_matrices(tmp_path):
    write_dense(tmp_path / "dense")
    parent = DenseParent(str(tmp_path / "dense"))
    shapes = {name: matrix.shape for name, matrix in parent.feed_forward(1).items()}

    assert parent.fits(1, shapes)
    assert not parent.fits(99, shapes)
    assert not parent.fits(1, {**shapes, "down": shapes["up"]})


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused():
    with pytest.raises(SettingsError, match="no such folder"):
        DenseParent("/no/such/folder")


def test_a_hub_model_that_is_not_here_is_refused():
    with pytest.raises(SettingsError, match="cannot be fetched from the Hub"):
        DenseParent("no-such-organisation/no-such-model")
