import socket

import huggingface_hub.constants
import pytest
from dense_checkpoints import sample_text, write_dense
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from upcycled_moe.common.checkpoint_names import name_checkpoints
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.tokenizers import train_tokenizer
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.source import open_source
from upcycled_moe.evaluation import evaluate as evaluation
from upcycled_moe.evaluation.evaluate import evaluate
from upcycled_moe.evaluation.settings import EvaluationSettings


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Folder of two domains."""
    folder = tmp_path_factory.mktemp("text")
    for seed, domain in enumerate(("prose", "code")):
        (folder / f"{domain}_validation.txt").write_text(sample_text(200, seed), encoding="utf-8")
    return folder


@pytest.fixture
def attempts(monkeypatch):
    """What tries to reach another machine, from here on; nothing gets there."""
    reached = []

    def refuse(*address):
        reached.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", lambda self, address: refuse(address))
    monkeypatch.setattr(socket.socket, "connect_ex", lambda self, address: refuse(address))
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    # The Hub's own switch would hide what tries.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return reached


def test_a_fresh_upcycled_copy_scores_what_its_parent_does(dense, items, text, tmp_path, attempts):
    recipe = ConversionRecipe(model=str(dense), num_experts=4, num_experts_per_tok=2, router="linear")
    convert(open_source(str(dense)), recipe, tmp_path / "moe")
    settings = EvaluationSettings(
        tasks=["router_upcycling"],
        offline_data=items,
        perplexity_data=[str(text)],
        tokens_per_domain=200,
        block_size=64,
        dtype="float32",
    )
    report = evaluate(name_checkpoints([str(dense), str(tmp_path / "moe")]), settings)
    parent, copy = report.checkpoints
    assert (parent.model_type, copy.model_type) == ("qwen2", "upcycled_qwen_moe")
    assert copy.num_parameters > parent.num_parameters
    assert copy.tasks == parent.tasks
    assert copy.averages == parent.averages
    assert list(copy.domains) == list(parent.domains) == ["code", "prose"]
    for domain, loss in copy.domains.items():
        assert loss.loss == pytest.approx(parent.domains[domain].loss, abs=1e-5)
        assert loss.num_tokens == parent.domains[domain].num_tokens <= 200
    assert attempts == []
    assert "tokenizers differ" not in " ".join(report.notes).lower()


def test_the_report_says_what_it_is_of(dense, items):
    settings = EvaluationSettings(tasks=["router_upcycling"], offline_data=items, limit=1)
    report = evaluate(name_checkpoints([f"a={dense}", f"b={dense}"]), settings)
    content = report.to_dict()
    assert [checkpoint["name"] for checkpoint in content["checkpoints"]] == ["a", "b"]
    assert all(task["offline"] and task["num_items"] == 1 for task in content["tasks"])
    assert {"lm-eval", "torch", "transformers"} <= set(content["versions"])
    assert content["settings"]["limit"] == 1
    assert content["checkpoints"][0]["averages"]["Understanding"]["missing"] == ["openbookqa_fact"]
    text = " ".join(report.notes)
    assert "first 1 items" in text
    assert "no average: openbookqa_fact" in text


def test_perplexity_needs_no_harness(dense, text, monkeypatch):
    monkeypatch.setattr(evaluation.importlib.util, "find_spec", lambda name: None)
    settings = EvaluationSettings(perplexity_data=[str(text)], tokens_per_domain=100)
    report = evaluate(name_checkpoints([str(dense)]), settings)
    assert report.tasks == []
    assert report.settings["block_size"] == 256
    assert "lm-eval" not in report.versions
    domain = report.to_dict()["checkpoints"][0]["domains"]["code"]
    assert domain["perplexity"] == pytest.approx(report.checkpoints[0].domains["code"].perplexity)
    assert domain["bits_per_byte"] > 0
    with pytest.raises(SettingsError, match=r"pip install 'upcycled-moe\[evaluation\]'"):
        evaluate(name_checkpoints([str(dense)]), EvaluationSettings(tasks=["boolq"]))


def test_checkpoints_of_other_tokenizers_read_the_same_text(dense, text, tmp_path):
    other = write_dense(tmp_path / "other", tokenizer=False)
    # One token a byte.
    train_tokenizer([], 257).save_pretrained(other)
    settings = EvaluationSettings(perplexity_data=[str(text)], tokens_per_domain=100000)
    report = evaluate(name_checkpoints([str(dense), str(other)]), settings)
    first, second = (checkpoint.domains["prose"] for checkpoint in report.checkpoints)
    num_bytes = len((text / "prose_validation.txt").read_bytes())
    # Targets are all but the first token of a block, and the end of the text.
    assert second.num_tokens == num_bytes + 1 - second.num_blocks
    assert second.num_bytes == num_bytes - second.num_blocks
    assert first.num_tokens < second.num_tokens
    assert num_bytes - 20 < first.num_bytes < num_bytes
    assert any("compare bits per byte" in note for note in report.notes)


def test_a_block_must_fit_into_all_models(dense, text):
    settings = EvaluationSettings(perplexity_data=[str(text)], block_size=257)
    with pytest.raises(SettingsError, match="block_size=257 exceeds the 256 positions of a model"):
        evaluate(name_checkpoints([str(dense)]), settings)


def test_a_classifier_is_refused_before_anything_is_evaluated(dense, text, tmp_path, monkeypatch):
    config = Qwen2Config(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=320
    )
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    monkeypatch.setattr(evaluation, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(SettingsError, match=r"classifier: holds a sequence classifier; give a language model\."):
        evaluate(
            name_checkpoints([str(dense), str(tmp_path / "classifier")]),
            EvaluationSettings(perplexity_data=[str(text)]),
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to evaluate"),
        ({"tasks": ["boolq"], "limit": 0}, "limit=0 must be at least 1"),
        ({"tasks": ["boolq"], "batch_size": "many"}, "batch_size='many' must be a number or auto"),
        ({"tasks": ["boolq"], "dtype": "int8"}, "dtype='int8': choose one of auto, "),
        ({"tasks": ["boolq"], "block_size": 8}, "block_size is for perplexity_data"),
        ({"perplexity_data": ["text"], "limit": 8}, "limit is for tasks"),
        ({"perplexity_data": ["text"], "block_size": 1}, "block_size=1 must be at least 2"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(SettingsError, match=message):
        EvaluationSettings(**settings)
