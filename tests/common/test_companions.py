"""A converted model's tokenizer makes the tokens that its parent's makes, whatever class the files declare."""

import json

import pytest
from dense_checkpoints import sample_text, write_dense
from fresh_models import Warnings
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer

from upcycled_moe.common.tokenizers import tokenizer_difference
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.source import open_source
from upcycled_moe.conversion.verify import verify


@pytest.fixture
def declaring(tmp_path):
    """`declaring("qwen2", "GPT2Tokenizer")`: a dense checkpoint; by its files a blank and digits can be one token."""

    def write(family, tokenizer_class):
        folder = write_dense(tmp_path / "dense", family, num_hidden_layers=1)
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator([sample_text()], 320, special_tokens=["<|endoftext|>"], show_progress=False)
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "tokenizer_class": tokenizer_class}
        settings = {name: value for name, value in settings.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return folder

    return write


@pytest.mark.parametrize(
    ("family", "declared"),
    [
        ("qwen2", "PreTrainedTokenizerFast"),
        ("qwen2", "LlamaTokenizerFast"),
        ("qwen2", "GPT2Tokenizer"),
        ("qwen2", None),
        ("qwen3", None),
    ],
)
def test_a_class_that_would_load_otherwise_is_declared_anew(declaring, tmp_path, linear_recipe, family, declared):
    dense, out, warnings = declaring(family, declared), tmp_path / "out", Warnings()
    convert(open_source(str(dense)), linear_recipe(), out, progress=warnings)
    parent = AutoTokenizer.from_pretrained(dense)
    for trust_remote_code in (False, True):
        child = AutoTokenizer.from_pretrained(out, trust_remote_code=trust_remote_code)
        assert type(child) is type(parent)
        assert tokenizer_difference(parent, child) is None
    before, after = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (dense, out))
    assert after == before | {"tokenizer_class": "Qwen2Tokenizer"}
    assert json.loads((out / "upcycling.json").read_text())["tokenizer_class"] == "Qwen2Tokenizer"
    assert any(f"its tokenizer declares {declared or 'no class'}" in message for message in warnings.messages)


@pytest.mark.parametrize(
    ("family", "declared"), [("qwen2", "Qwen2TokenizerFast"), ("qwen3", "PreTrainedTokenizerFast")]
)
def test_a_class_that_loads_alike_stays_as_it_is(declaring, tmp_path, linear_recipe, family, declared):
    dense, out, warnings = declaring(family, declared), tmp_path / "out", Warnings()
    convert(open_source(str(dense)), linear_recipe(), out, progress=warnings)
    assert (out / "tokenizer_config.json").read_bytes() == (dense / "tokenizer_config.json").read_bytes()
    assert json.loads((out / "upcycling.json").read_text())["tokenizer_class"] is None
    assert not any("tokenizer" in message for message in warnings.messages)


def test_without_settings_of_the_tokenizer_they_are_written(declaring, tmp_path, linear_recipe):
    dense = declaring("qwen2", None)
    (dense / "tokenizer_config.json").unlink()
    convert(open_source(str(dense)), linear_recipe(), tmp_path / "out")
    parent, child = (AutoTokenizer.from_pretrained(folder) for folder in (dense, tmp_path / "out"))
    assert tokenizer_difference(parent, child) is None


def test_a_tokenizer_that_cannot_be_loaded_comes_along_with_a_warning(declaring, tmp_path, linear_recipe):
    dense, out, warnings = declaring("qwen2", None), tmp_path / "out", Warnings()
    (dense / "tokenizer.json").write_text("{}", encoding="utf-8")
    convert(open_source(str(dense)), linear_recipe(), out, progress=warnings)
    assert any("files are carried over as they are" in message for message in warnings.messages)
    assert (out / "tokenizer.json").read_text(encoding="utf-8") == "{}"


def test_verify_tells_a_tokenizer_that_differs(declaring, tmp_path, linear_recipe):
    dense, out = declaring("qwen2", "PreTrainedTokenizerFast"), tmp_path / "out"
    convert(open_source(str(dense)), linear_recipe(), out)
    assert verify(str(dense), str(out), num_sequences=1, sequence_length=4).equal
    (out / "tokenizer_config.json").write_bytes((dense / "tokenizer_config.json").read_bytes())
    report = verify(str(dense), str(out), num_sequences=1, sequence_length=4)
    assert report.has_equal_logits
    assert not report.equal
    assert "becomes the tokens [" in report.tokenizer_difference
    (out / "tokenizer.json").unlink()
    assert verify(str(dense), str(out), num_sequences=1, sequence_length=4).tokenizer_difference is None
