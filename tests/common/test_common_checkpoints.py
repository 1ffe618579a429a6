"""Checkpoints are loaded by the code that lies beside them, and downloaded code only with leave."""

import json

import pytest
import torch
from dense_checkpoints import byte_level_tokenizer, write_dense
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from upcycled_moe.common import checkpoints
from upcycled_moe.common.checkpoints import check_code, load_config, load_model, load_tokenizer
from upcycled_moe.common.settings import SettingsError


@pytest.fixture
def ours(make_moe, tmp_path):
    folder = tmp_path / "ours"
    make_moe().save_pretrained(folder)
    return folder


def load(folder, **options):
    return load_model(str(folder), load_config(str(folder)), dtype=torch.float32, device="cpu", **options)


def test_a_checkpoint_runs_the_code_beside_it(ours):
    model = load(ours)
    assert type(model).__name__ == "UpcycledQwenMoeForCausalLM"
    assert type(model).__module__.startswith("transformers_modules.")
    assert not model.training


def test_a_stock_checkpoint_needs_none(tmp_path, make_tokens):
    torch.manual_seed(0)
    expected = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=128,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )
    expected.eval().save_pretrained(tmp_path / "stock")
    check_code(str(tmp_path / "stock"), trust_remote_code=False)
    tokens = make_tokens(2, 8)
    model = load(tmp_path / "stock")
    assert isinstance(model, Qwen3MoeForCausalLM)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)


def test_code_of_another_repository_needs_leave(ours):
    config = json.loads((ours / "config.json").read_text(encoding="utf-8"))
    config["auto_map"]["AutoConfig"] = "org/other--configuration.Config"
    check_code(str(ours), trust_remote_code=False)
    (ours / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SettingsError, match=r"config\.json: names code of another repository \(org/other--"):
        check_code(str(ours), trust_remote_code=False)
    check_code(str(ours), trust_remote_code=True)


@pytest.mark.parametrize("auto_map", [{}, {"AutoConfig": "configuration.Config"}])
def test_code_of_a_hub_checkpoint_needs_leave(monkeypatch, auto_map):
    monkeypatch.setattr(checkpoints, "_config_dict", lambda model, revision: {"auto_map": auto_map})
    if auto_map:
        with pytest.raises(SettingsError, match=r"org/model: this Hub checkpoint runs code .*--trust-remote-code"):
            check_code("org/model", trust_remote_code=False)
    else:
        check_code("org/model", trust_remote_code=False)


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "a/b/c", "a folder"])
def test_what_is_no_folder_and_no_hub_id_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="no such folder, and not a Hub id like org/name"):
        check_code(name, trust_remote_code=True)


def test_a_folder_without_configuration_or_tokenizer_is_named(tmp_path, ours):
    with pytest.raises(SettingsError, match=r"there is no config\.json; give the folder of a finished checkpoint"):
        load_config(str(tmp_path))
    with pytest.raises(SettingsError, match="ours: cannot be loaded"):
        load_tokenizer(str(ours))


def test_an_empty_tokenizer_is_none(tmp_path):
    """Beside a Qwen2 model, Transformers makes one of no files."""
    write_dense(tmp_path / "dense", "qwen2", tokenizer=False)
    with pytest.raises(SettingsError, match=r"dense: there is no tokenizer; put its files beside the weights\.$"):
        load_tokenizer(str(tmp_path / "dense"))


def without_norm(tensors):
    del tensors["model.norm.weight"]


def with_wide_norm(tensors):
    tensors["model.norm.weight"] = torch.ones(65)


def with_layer_too_many(tensors):
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.ones(96, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_norm, r"dense: tensor 'model\.norm\.weight' is missing from the files; give a checkpoint whose"),
        (with_wide_norm, r"dense: tensor 'model\.norm\.weight' has another shape in the files than the configuration"),
        (with_layer_too_many, r"dense: tensor 'model\.layers\.3\.mlp\.up_proj\.weight' has no place in the model;"),
    ],
)
def test_weights_that_the_configuration_does_not_describe_are_refused(tmp_path, change, message):
    change_tensors(write_dense(tmp_path / "dense"), change)
    with pytest.raises(SettingsError, match=message):
        load(tmp_path / "dense")


def with_frequencies_and_tied_head(tensors):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def test_what_follows_from_the_rest_may_be_stored_too(tmp_path):
    expected = load(write_dense(tmp_path / "dense"))
    change_tensors(tmp_path / "dense", with_frequencies_and_tied_head)
    model = load(tmp_path / "dense")
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("auto_map", [None, ["configuration.Config"]])
def test_code_that_is_not_named_as_it_should_is_refused(tmp_path, auto_map):
    folder = write_dense(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}), encoding="utf-8")
    with pytest.raises(SettingsError, match=r"dense: auto_map in config\.json is .* instead of names of classes"):
        check_code(str(folder), trust_remote_code=False)
    with pytest.raises(SettingsError, match="instead of names of classes"):
        load_config(str(folder))


def test_a_tokenizer_is_loaded_from_the_folder(tmp_path):
    write_dense(tmp_path / "dense", "qwen2")
    tokenizer = load_tokenizer(str(tmp_path / "dense"))
    assert tokenizer("of the").input_ids == byte_level_tokenizer()("of the").input_ids
