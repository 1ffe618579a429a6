import json
import os
import shutil
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from upcycled_moe.common.streaming.stored import SourceError
from upcycled_moe.conversion.source import expected_shapes, open_source


@pytest.fixture
def copy_of(dense, tmp_path):
    """`copy_of(…)`: a copy of a shared checkpoint that a test may spoil."""

    def copy(*arguments, **fields):
        return shutil.copytree(dense(*arguments, **fields), tmp_path / "copy")

    return copy


def edit_json(path, **changes):
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content), encoding="utf-8")


def rewrite_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["qwen2", "qwen2-sliding", "qwen1.5", "qwen3"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_headers_and_bytes_are_those_of_safetensors(dense, family, max_shard_size):
    source = open_source(str(dense(family, max_shard_size=max_shard_size)))
    assert (len(source.weight_files) > 1) == (max_shard_size == "100KB")
    seen = set()
    for path in source.weight_files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                assert torch.equal(source.tensors[name].load(), file.get_tensor(name)), name
                seen.add(name)
    assert seen == set(source.tensors)


@pytest.mark.parametrize("family", ["qwen2", "qwen2-sliding", "qwen1.5", "qwen3"])
def test_expected_shapes_are_those_of_the_model(dense, family):
    folder = dense(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    # A tied head is one parameter, named after the embedding.
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert expected_shapes(open_source(str(folder)).config) == shapes


def test_tensors_need_not_be_aligned(copy_of):
    folder = copy_of()
    path = folder / "model.safetensors"
    expected = {name: tensor.clone() for name, tensor in load_file(path).items()}
    content = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + header_bytes].rstrip(b" ")
    header += b" " * (1 - len(header) % 2)
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + header_bytes :])
    source = open_source(str(folder))
    assert any(tensor.offset % 4 for tensor in source.tensors.values())
    for name, tensor in source.tensors.items():
        assert torch.equal(tensor.load(), expected[name])


def test_a_tied_head_and_rotary_frequencies_may_be_stored(copy_of):
    folder = copy_of()

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    rewrite_weights(folder, add)
    assert "lm_head.weight" in open_source(str(folder)).tensors


def test_one_file_goes_before_shards_as_in_transformers(copy_of):
    folder = copy_of()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "absent.safetensors"}}), encoding="utf-8"
    )
    assert [path.name for path in open_source(str(folder)).weight_files] == ["model.safetensors"]


def last_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[-1]


def corrupt_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"#" + path.read_bytes()[9:])


def huge_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def foreign_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b'["a"]   ')


def add_to_index(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index["weight_map"]["model.layers.9.absent.weight"] = last_shard(folder).name
    path.write_text(json.dumps(index), encoding="utf-8")


def cut_last_byte(folder):
    os.truncate(last_shard(folder), last_shard(folder).stat().st_size - 1)


def only_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop(name):
    return lambda folder: rewrite_weights(folder, lambda tensors: tensors.pop(name))


def put(name, tensor):
    return lambda folder: rewrite_weights(folder, lambda tensors: tensors.update({name: tensor}))


SPOILED = {
    "truncated file": (lambda f: os.truncate(f / "model.safetensors", 5000), r"truncated: its header promises"),
    "truncated header": (lambda f: os.truncate(f / "model.safetensors", 100), r"truncated inside its header"),
    "empty file": (lambda f: os.truncate(f / "model.safetensors", 0), r"truncated inside its header"),
    "corrupt header": (corrupt_header, r"its header is not JSON"),
    "huge header": (huge_header, r"truncated inside its header"),
    "foreign header": (foreign_header, r"its header lists no tensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"neither model\.safetensors nor an index"),
    "only bin": (only_bin, r"It has pytorch_model\.bin weights: load and save"),
    "missing tensor": (drop("model.norm.weight"), r"tensor 'model\.norm\.weight' is missing"),
    "unknown tensor": (put("model.extra.weight", torch.ones(2)), r"'model\.extra\.weight' has no place in a qwen2"),
    "wrong shape": (put("model.norm.weight", torch.ones(2)), r"has shape \(2,\), the configuration says \(64,\)"),
    "wrong type": (
        put("model.norm.weight", torch.ones(64, dtype=torch.int8)),
        r"has type I8; allowed: BF16",
    ),
    "mixed types": (
        put("model.layers.1.mlp.up_proj.weight", torch.ones(96, 64, dtype=torch.bfloat16)),
        r"layer 1 has matrices of different types \(BF16, F32\)",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"there is no config\.json"),
    "corrupt config": (lambda f: (f / "config.json").write_text("{", encoding="utf-8"), r"not valid JSON"),
    "list for config": (lambda f: (f / "config.json").write_text("[]", encoding="utf-8"), r"holds a list"),
    "wrong config": (lambda f: edit_json(f / "config.json", hidden_size="wide"), r"not a valid configuration"),
    "llama": (lambda f: edit_json(f / "config.json", model_type="llama"), r"model_type 'llama' cannot be upcycled"),
    "already MoE": (lambda f: edit_json(f / "config.json", model_type="qwen3_moe"), r"model_type 'qwen3_moe' cannot"),
    "no model type": (lambda f: edit_json(f / "config.json", model_type=None), r"model_type None cannot"),
    "quantized": (lambda f: edit_json(f / "config.json", quantization_config={"bits": 4}), r"weights are quantized"),
    "wrong head": (
        lambda f: edit_json(f / "config.json", architectures=["Qwen2ForTokenClassification"]),
        r"architecture 'Qwen2ForTokenClassification' cannot be upcycled",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_a_spoiled_checkpoint_is_refused(copy_of, spoil, message):
    folder = copy_of()
    spoil(folder)
    with pytest.raises(SourceError, match=message) as error:
        open_source(str(folder))
    assert str(folder) in str(error.value)


def repeat_tensor(folder):
    first, last = (load_file(sorted(folder.glob("model-*.safetensors"))[number]) for number in (0, -1))
    name = min(first)
    save_file(last | {name: first[name] + 1}, last_shard(folder), metadata={"format": "pt"})


SPOILED_SHARDS = {
    "tensor in two shards": (repeat_tensor, r"tensor '.*' is both in model-00001-of-.* and in model-"),
    "missing shard": (lambda f: last_shard(f).unlink(), r"the shard is missing"),
    "truncated shard": (cut_last_byte, r"truncated: its header promises"),
    "absent tensor": (add_to_index, r"index names 'model\.layers\.9\.absent\.weight', but no shard has it"),
    "corrupt index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}", encoding="utf-8"),
        r"not a valid index",
    ),
    "list for index": (
        lambda f: (f / "model.safetensors.index.json").write_text("[1]", encoding="utf-8"),
        r"not a valid index",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED_SHARDS.values(), ids=SPOILED_SHARDS)
def test_spoiled_shards_are_refused(copy_of, spoil, message):
    folder = copy_of(max_shard_size="100KB")
    spoil(folder)
    with pytest.raises(SourceError, match=message):
        open_source(str(folder))


def test_a_local_folder_has_no_revision(dense):
    with pytest.raises(SourceError, match=r"revision='main' has no meaning for the local folder .*; leave it out"):
        open_source(str(dense()), "main")


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "weights").touch()
    with pytest.raises(SourceError, match="is a file; give the folder"):
        open_source(str(tmp_path / "weights"))


def test_what_is_neither_here_nor_on_the_hub_is_refused():
    with pytest.raises(SourceError, match="neither a local folder nor a Hub model"):
        open_source("./no/such/folder")
