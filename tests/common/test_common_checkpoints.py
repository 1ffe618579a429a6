"""Checkpoints are loaded by the code that lies beside them, and downloaded code only with leave."""

import json

import pytest
import torch
from dense_checkpoints import byte_level_tokenizer, write_dense
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


@pytest.mark.parametrize("auto_map", [None, {}, {"AutoConfig": "configuration.Config"}])
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


def test_a_tokenizer_is_loaded_from_the_folder(tmp_path):
    write_dense(tmp_path / "dense", "qwen2")
    tokenizer = load_tokenizer(str(tmp_path / "dense"))
    assert tokenizer("of the").input_ids == byte_level_tokenizer()("of the").input_ids
