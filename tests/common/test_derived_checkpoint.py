"""A checkpoint made of another one: it loads before it is in place, and is there whole or not at all."""

import pytest
import torch
from dense_checkpoints import folder_hashes
from moe_checkpoints import write_checkpoint

from upcycled_moe.common.checkpoints import load_config, load_model, load_tokenizer
from upcycled_moe.common.derived_checkpoint import DerivedCheckpoint, check_derived, written
from upcycled_moe.common.moe_source import open_moe
from upcycled_moe.common.output_folder import OutputError
from upcycled_moe.common.progress import Progress
from upcycled_moe.common.streaming.contents import FileBytes
from upcycled_moe.common.streaming.planned import PlannedTensor, into_shards


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_moe(str(write_checkpoint(tmp_path_factory.mktemp("moe") / "original", "linear")))


def _copy_of(source, max_shard_bytes=10**9):
    tensors = [
        PlannedTensor(name, tensor.dtype, tensor.shape, FileBytes.whole(tensor))
        for name, tensor in source.tensors.items()
    ]
    return DerivedCheckpoint(source, source.config, into_shards(tensors, max_shard_bytes))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_it_loads_in_the_body_and_afterwards(source, tmp_path, max_shard_bytes):
    derived, out = _copy_of(source, max_shard_bytes), tmp_path / "out"
    expected = load_model(str(source.folder), source.config, dtype="auto", device="cpu")
    with written(derived, out, False, Progress()) as folder:
        assert not out.exists()
        inside = load_model(str(folder), load_config(str(folder)), dtype="auto", device="cpu").state_dict()
    outside = load_model(str(out), load_config(str(out)), dtype="auto", device="cpu").state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(inside[name], value)
        assert torch.equal(outside[name], value)
    assert derived.total_parameters == sum(parameter.numel() for parameter in expected.parameters())
    assert len(list(out.glob("*.safetensors"))) == len(derived.shards)
    assert load_tokenizer(str(out)).get_vocab() == load_tokenizer(str(source.folder)).get_vocab()


def test_an_error_in_the_body_leaves_what_was_there(source, tmp_path):
    derived, out = _copy_of(source), tmp_path / "out"
    with written(derived, out, False, Progress()) as folder:
        (folder / "note.txt").write_text("first", encoding="utf-8")
    before = folder_hashes(out)
    with pytest.raises(RuntimeError, match="measured badly"), written(derived, out, True, Progress()):
        raise RuntimeError("measured badly")
    assert folder_hashes(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_source_and_what_lies_in_it_are_no_output(source):
    derived = _copy_of(source)
    with pytest.raises(OutputError, match=f"is {source.name} itself"):
        check_derived(derived, source.folder, (), overwrite=True)
    with pytest.raises(OutputError, match=f"lies in the folder of {source.name}"):
        check_derived(derived, source.folder / "export", (), overwrite=True)


def test_what_is_read_is_not_replaced(source, tmp_path):
    text = tmp_path / "out" / "text.txt"
    with pytest.raises(OutputError, match="which replacing it would delete"):
        check_derived(_copy_of(source), tmp_path / "out", (text,), overwrite=True)
