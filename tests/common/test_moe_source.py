"""An upcycled checkpoint opened by its headers: what is wrong with it is said before anything is read."""

import json
import shutil

import pytest
import torch
from dense_checkpoints import write_dense
from moe_checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file

from upcycled_moe.common.checkpoints import load_model
from upcycled_moe.common.moe_source import open_moe
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.streaming.stored import SourceError


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint with a router bias, a buffer; no test writes into it."""
    folder = tmp_path_factory.mktemp("moe") / "original"
    return write_checkpoint(folder, "mixture", use_router_bias=True, tie_word_embeddings=True)


@pytest.fixture
def checkpoint(original, tmp_path):
    return shutil.copytree(original, tmp_path / "moe")


def _change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields), encoding="utf-8")


def _change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_every_tensor_of_the_model_is_there_with_its_values(original):
    source = open_moe(str(original))
    model = load_model(str(original), source.config, dtype="auto", device="cpu", own_code=False)
    expected = model.state_dict()
    del expected["lm_head.weight"]  # it is the embedding
    assert source.tensors.keys() == expected.keys()
    for name, tensor in source.tensors.items():
        assert torch.equal(tensor.load(), expected[name]), name
    assert source.has_tokenizer
    assert source.provenance is None
    assert source.weight_files == [original / "model.safetensors"]


def test_a_router_is_that_of_the_model(original):
    source = open_moe(str(original))
    model = load_model(str(original), source.config, dtype="auto", device="cpu", own_code=False)
    tokens = torch.randn(7, source.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer_idx in source.config.moe_layers:
            expected = model.model.layers[layer_idx].mlp.gate(tokens)
            for found, wanted in zip(source.router(layer_idx)(tokens), expected, strict=True):
                assert torch.equal(found, wanted)


def test_a_tied_head_may_be_stored_too(checkpoint):
    _change_tensors(checkpoint, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" in open_moe(str(checkpoint)).tensors


def test_a_dense_checkpoint_is_refused(tmp_path):
    folder = write_dense(tmp_path / "dense", num_hidden_layers=1)
    with pytest.raises(SourceError, match="model_type 'qwen2' is not that of an upcycled checkpoint"):
        open_moe(str(folder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization_config": {"bits": 4}}, "its weights are quantized"),
        ({"dtype": "float33"}, "not a valid configuration .*float33"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 exceeds num_experts=4"),
        ({"architectures": ["LlamaForCausalLM"]}, "architecture 'LlamaForCausalLM' is unknown"),
        ({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, "is missing; is a shard absent"),
        (
            {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
            "has no place in the model that config.json describes",
        ),
        ({"moe_intermediate_size": 8}, r"has shape \(4, 48, 32\), the configuration says \(4, 16, 32\)"),
    ],
)
def test_a_configuration_that_does_not_fit_is_an_error(checkpoint, fields, message):
    _change_config(checkpoint, **fields)
    with pytest.raises(SourceError, match=message):
        open_moe(str(checkpoint))


def test_damaged_provenance_is_an_error_before_anything_is_made_of_it(checkpoint):
    (checkpoint / "upcycling.json").write_text('{"source": {"name": "a/b"', encoding="utf-8")
    with pytest.raises(SettingsError, match=r"upcycling\.json: not valid JSON"):
        open_moe(str(checkpoint))


def test_a_name_that_says_nothing_elsewhere_is_recorded_as_that_of_the_folder(checkpoint, monkeypatch):
    (checkpoint / "inner").mkdir()
    for folder, name in ((checkpoint, "."), (checkpoint / "inner", "..")):
        monkeypatch.chdir(folder)
        assert open_moe(name).record == {"name": checkpoint.name, "revision": None}
    assert open_moe(str(checkpoint)).record == {"name": str(checkpoint), "revision": None}


def test_an_empty_name_is_not_that_of_the_current_folder(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    with pytest.raises(SourceError, match="'' is no checkpoint; give a folder"):
        open_moe("")


def test_a_missing_tensor_is_an_error(checkpoint):
    _change_tensors(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.gate.keys"))
    with pytest.raises(SourceError, match=r"'model\.layers\.1\.mlp\.gate\.keys' is missing"):
        open_moe(str(checkpoint))


def test_a_file_cut_short_is_an_error(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError, match="truncated"):
        open_moe(str(checkpoint))
