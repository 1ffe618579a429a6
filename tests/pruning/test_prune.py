"""Pruning from checkpoint to checkpoint: the right experts go, and what is said of it is true."""

import os
import signal
from dataclasses import fields, replace

import pytest
import torch
from dense_checkpoints import byte_level_tokenizer, exit_status, folder_hashes
from moe_checkpoints import DOMAINS, make_model, write_checkpoint
from safetensors.torch import load_file

from modeling_upcycled_moe import UpcycledQwenMoeForCausalLM
from upcycled_moe.common.checkpoints import load_config, load_model
from upcycled_moe.common.moe_source import open_moe
from upcycled_moe.common.progress import Progress
from upcycled_moe.common.provenance import read_provenance
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.text_settings import TextSettings
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.source import open_source
from upcycled_moe.merging.merge import merge, plan_merge
from upcycled_moe.merging.settings import MergeSettings
from upcycled_moe.pruning import prune as prune_module
from upcycled_moe.pruning.prune import prune
from upcycled_moe.pruning.settings import METHODS, PruneSettings


@pytest.fixture
def settings(text):
    """`settings("reap", 2, …)`: a short pass over the text."""

    def make(method="reap", num_experts=2, split="train", **fields):
        calibration = TextSettings(data=[str(text)], split=split, tokens_per_domain=256, block_size=64)
        return PruneSettings(method, num_experts, calibration, max_shard_bytes=20_000, **fields)

    return make


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("moe") / "original", "linear")


def _save(model, folder):
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return open_moe(str(folder))


def _logits(folder, make_tokens):
    model = load_model(str(folder), load_config(str(folder)), dtype="auto", device="cpu")
    with torch.no_grad():
        return model(make_tokens(2, 40)).logits


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_that_nobody_selects_goes_and_nothing_changes(tmp_path, settings, make_tokens, method):
    # With one expert a token its weight is one, whatever the others score.
    model = make_model("linear", use_router_bias=True, num_experts_per_tok=1)
    unused = (2, 0, 3)
    for layer, expert in zip(model.model.layers, unused, strict=True):
        layer.mlp.gate.selector.e_score_correction_bias[expert] = -10.0
    result = prune(_save(model, tmp_path / "moe"), settings(method, 3), tmp_path / "out")
    assert [layer.kept for layer in result.layers] == [[e for e in range(4) if e != expert] for expert in unused]
    assert torch.equal(_logits(tmp_path / "moe", make_tokens), _logits(tmp_path / "out", make_tokens))
    assert result.before.overall.loss == result.after.overall.loss


def test_merged_twins_are_one_expert(tmp_path, settings, make_tokens):
    model = make_model("linear", num_experts=3, num_experts_per_tok=1)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            experts, gate = layer.mlp.experts, layer.mlp.gate
            order = torch.randperm(24, generator=torch.Generator().manual_seed(number))
            experts.gate_up_proj[1] = experts.gate_up_proj[0][torch.cat((order, order + 24))]
            experts.down_proj[1] = experts.down_proj[0][:, order]
            # One has the tokens with logits below zero, the other those above.
            gate.weight[1] = gate.weight[0] * 1.0001
    result = prune(_save(model, tmp_path / "moe"), settings("merge"), tmp_path / "out")
    for layer in result.layers:
        assert min(layer.scores) > 0
        assert sorted(sorted(group) for group in layer.groups) == [[0, 1], [2]]
    before, after = _logits(tmp_path / "moe", make_tokens), _logits(tmp_path / "out", make_tokens)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["easy_ep", "merge"])
def test_what_is_recorded_is_what_was_done(checkpoint, tmp_path, settings, text, method):
    source = open_moe(str(checkpoint))
    result = prune(source, settings(method, evaluation_data=[str(text / "words")]), tmp_path / "out")
    [step] = read_provenance(tmp_path / "out")["steps"]
    assert (step["command"], step["method"]) == ("prune", method)
    assert step["source"] == {"name": str(checkpoint), "revision": None}
    assert step["num_experts"] == {"before": 4, "after": 2}
    assert step["calibration_tokens"] == dict.fromkeys(DOMAINS, 256)
    read = {field.name: field.default for field in fields(TextSettings)} | {"tokens_per_domain": 256, "block_size": 64}
    assert step["text"] == read | {"data": [str(text)], "split": "train"}
    assert step["evaluation_text"] == read | {"data": [str(text / "words")], "split": "validation"}
    written = load_model(str(tmp_path / "out"), load_config(str(tmp_path / "out")), dtype="auto", device="cpu")
    assert step["total_parameters"] == sum(parameter.numel() for parameter in written.parameters())
    # A token has both experts that are left.
    assert step["active_parameters"] == step["total_parameters"]
    for layer, recorded in zip(result.layers, step["layers"], strict=True):
        assert recorded["layer"] == layer.index
        assert recorded["scores"] == pytest.approx(list(layer.scores), rel=1e-5)
        best = sorted(sorted(range(4), key=lambda expert: -layer.scores[expert])[:2])
        assert recorded["kept"] == layer.kept == best
        name = f"model.layers.{layer.index}.mlp.gate.weight"
        assert torch.equal(written.state_dict()[name], source.tensors[name].load()[best])
    assert ("groups" in step["layers"][0]) is (method == "merge")
    assert (tmp_path / "out" / "README.md").is_file()


def test_losses_are_those_of_the_checkpoint_and_of_the_result(checkpoint, tmp_path, settings):
    result = prune(open_moe(str(checkpoint)), settings(), tmp_path / "out")
    # As the result of a later pruning says it: before that, it is the checkpoint.
    again = prune(open_moe(str(tmp_path / "out")), settings(num_experts=1, num_experts_per_tok=1), tmp_path / "less")
    assert again.before == result.after
    assert list(result.before.domains) == list(DOMAINS)
    losses = result.before.domains.values()
    total = sum(loss.loss * loss.num_tokens for loss in losses) / sum(loss.num_tokens for loss in losses)
    assert result.before.overall.loss == pytest.approx(total, rel=1e-6)
    assert result.before.overall.loss != result.after.overall.loss
    assert result.notes == []
    steps = read_provenance(tmp_path / "less")["steps"]
    assert [step["num_experts"]["after"] for step in steps] == [2, 1]
    assert steps[1]["loss"]["before"] == steps[0]["loss"]["after"]
    assert steps[0]["loss"]["after"]["mean"] == result.after.overall.loss


def test_the_same_text_for_both_is_told(checkpoint, tmp_path, settings, text):
    source = open_moe(str(checkpoint))
    result = prune(source, settings(split="validation"), tmp_path / "out", dry_run=True)
    assert result.notes[0].startswith("The loss on letters, numbers, words is on text that the scores come from too")
    other = settings(split="validation", evaluation_data=[str(text / "letters" / "train.jsonl")])
    assert prune(source, other, tmp_path / "out", dry_run=True).notes == []


@pytest.fixture(scope="module")
def slices(dense, linear_recipe, tmp_path_factory):
    """A fresh checkpoint of four copies of FFNs, in two slices each."""
    out = tmp_path_factory.mktemp("slices") / "moe"
    recipe = linear_recipe(num_experts=8, experts="split", expert_granularity=2, num_experts_per_tok=2)
    convert(open_source(str(dense())), recipe, out)
    return out


@pytest.mark.parametrize("method", METHODS)
def test_fresh_slices_compute_the_same_with_fewer_copies(slices, tmp_path, settings, method):
    """A token has all slices of a copy, as long as the same copies are left of each."""
    result = prune(open_moe(str(slices)), settings(method, 4), tmp_path / "out")
    for layer in result.layers:
        assert layer.kept == [*layer.kept[:2], *(expert + 4 for expert in layer.kept[:2])]
    assert result.after.overall.loss == pytest.approx(result.before.overall.loss, rel=1e-6)


def test_slices_that_are_left_can_be_told(slices, dense, tmp_path, settings):
    prune(open_moe(str(slices)), settings("frequency", 4), tmp_path / "half")
    source = open_moe(str(tmp_path / "half"))
    merge(plan_merge(source, MergeSettings(), tmp_path / "merged", 10**9), tmp_path / "merged")
    first, second = (load_file(folder / "model.safetensors") for folder in (dense(), tmp_path / "merged"))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    with pytest.raises(SettingsError, match="num_experts=3 is not a multiple of the 2 of expert_granularity"):
        prune(source, settings(num_experts=3), tmp_path / "out")
    source.provenance["steps"][-1]["num_experts"]["after"] = 6
    with pytest.raises(SettingsError, match="was converted to 8 slices of FFNs and has 4 experts; nothing says which"):
        prune(source, settings(num_experts=2), tmp_path / "out")


def test_narrow_experts_need_the_recipe(slices, tmp_path, settings):
    source = replace(open_moe(str(slices)), provenance=None)
    with pytest.raises(SettingsError, match="has experts narrower than the FFN, and no upcycling"):
        prune(source, settings(num_experts=4), tmp_path / "out")


def test_a_checkpoint_without_a_tokenizer_cannot_read_text(tmp_path, settings):
    make_model("linear").save_pretrained(tmp_path / "moe")
    with pytest.raises(SettingsError, match=r"moe: has no tokenizer to read text with; put its files beside"):
        prune(open_moe(str(tmp_path / "moe")), settings(), tmp_path / "out")


def test_a_classifier_has_no_loss(tmp_path, settings):
    source = open_moe(str(write_checkpoint(tmp_path / "moe", "classifier")))
    result = prune(source, settings("easy_ep"), tmp_path / "out")
    assert result.before is result.after is None
    assert result.notes == ["The checkpoint is a classifier, which predicts no text: the loss is not measured."]
    assert read_provenance(tmp_path / "out")["steps"][0]["loss"] == {"before": None, "after": None}
    config = load_config(str(tmp_path / "out"))
    loaded = load_model(str(tmp_path / "out"), config, dtype="auto", device="cpu")
    assert (type(loaded).__name__, config.num_experts) == ("UpcycledQwenMoeForSequenceClassification", 2)
    with pytest.raises(SettingsError, match="is a classifier, which predicts no text; leave --eval-data out"):
        prune(source, settings(evaluation_data=["text.txt"]), tmp_path / "out")
    with pytest.raises(SettingsError, match="is a classifier, which predicts no text; leave --eval-split out"):
        prune(source, settings(evaluation_split="test"), tmp_path / "out")


def test_a_dry_run_aligns_and_writes_nothing(checkpoint, tmp_path, settings, monkeypatch):
    before = folder_hashes(tmp_path)
    source = open_moe(str(checkpoint))
    with monkeypatch.context() as patched:
        patched.setattr(prune_module, "merged_expert", None)
        planned = prune(source, settings("merge"), tmp_path / "out", dry_run=True)
    assert folder_hashes(tmp_path) == before == {}
    written = prune(source, settings("merge"), tmp_path / "out")
    assert (planned.folder, planned.after) == (None, None)
    assert planned.layers == written.layers
    assert planned.num_bytes == written.num_bytes < sum(tensor.num_bytes for tensor in source.tensors.values())
    assert planned.total_parameters == UpcycledQwenMoeForCausalLM(load_config(str(tmp_path / "out"))).num_parameters()


def test_a_failure_leaves_nothing(checkpoint, tmp_path, settings, monkeypatch):
    monkeypatch.setattr(prune_module, "write_card", lambda *folders: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        prune(open_moe(str(checkpoint)), settings(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _prune_and_die(checkpoint, settings, out):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    prune_module.write_provenance = die
    prune(open_moe(checkpoint), settings, out)


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_loads(checkpoint, tmp_path, settings):
    out = tmp_path / "out"
    assert exit_status(_prune_and_die, str(checkpoint), settings(), out) == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    with pytest.raises(SettingsError):
        load_config(str(tmp_path / "out.partial"))
    prune(open_moe(str(checkpoint)), settings(), out, progress=Progress())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_experts_whose_outputs_are_not_finite_are_an_error(tmp_path, settings):
    model = make_model("linear")
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj.fill_(1e38)
    source = _save(model, tmp_path / "moe")
    with pytest.raises(SettingsError, match="not finite"):
        prune(source, settings(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _text_in(folder):
    folder.mkdir()
    path = folder / "text.txt"
    path.write_text("the of and to", encoding="utf-8")
    return path


def test_what_is_read_is_not_replaced(checkpoint, tmp_path, settings, text):
    with pytest.raises(SettingsError, match="which replacing it would delete"):
        prune(open_moe(str(checkpoint)), settings(), text, overwrite=True)
    other = settings(evaluation_data=[str(_text_in(tmp_path / "out"))])
    with pytest.raises(SettingsError, match="which replacing it would delete"):
        prune(open_moe(str(checkpoint)), other, tmp_path / "out", overwrite=True)
    with pytest.raises(SettingsError, match=f"is {checkpoint} itself"):
        prune(open_moe(str(checkpoint)), settings(), checkpoint, overwrite=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "random"}, "method='random': choose one of reap, frequency, easy_ep, merge"),
        ({"num_experts": 0}, "num_experts=0 must be at least 1"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be at least 1"),
    ],
)
def test_impossible_settings_are_errors(settings, fields, message):
    with pytest.raises(SettingsError, match=message):
        settings(**fields)
