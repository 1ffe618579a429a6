"""Coefficients are learned: from data that one source, or a known mixture, made, they come out as that."""

import copy
import itertools
import json
import random
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from dense_checkpoints import SHAPE, WORDS, byte_level_tokenizer
from moe_checkpoints import write_checkpoint
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from upcycled_moe.common.checkpoints import load_model
from upcycled_moe.common.learned_merge.checkpoints import open_checkpoints
from upcycled_moe.common.learned_merge.coefficients import SoftmaxCoefficients
from upcycled_moe.common.learned_merge.merge import BlendGroup, LearnedMerge
from upcycled_moe.common.learned_merge.sources import Blend, StoredSource
from upcycled_moe.common.progress import Progress
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.streaming.stored import read_tensors
from upcycled_moe.preference import fitting
from upcycled_moe.preference.fit_plot import plot_fit
from upcycled_moe.preference.fitting import fit_coefficients, split
from upcycled_moe.preference.settings import FitSettings
from upcycled_moe.preference.template import CHATML


TINY = {**SHAPE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "initializer_range": 0.3}
CLASSES = {"bradley_terry": Qwen2ForSequenceClassification, "dpo": Qwen2ForCausalLM, "lm": Qwen2ForCausalLM}


class _Warnings(Progress):
    def __init__(self):
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


@pytest.fixture
def tokenizer():
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = CHATML
    return tokenizer


def _model(loss, seed):
    torch.manual_seed(seed)
    config = Qwen2Config(**TINY, num_labels=1, pad_token_id=byte_level_tokenizer().pad_token_id)
    return CLASSES[loss](config).eval()


class _Sources:
    """Three models as sources, which began as one, and the model that a mixture of them is."""

    def __init__(self, loss, folder):
        self.loss = loss
        self.models = [_model(loss, 0) for _ in range(3)]
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in (value for model in self.models for value in model.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)
        for seed, model in enumerate(self.models):
            path = folder / loss / str(seed)
            path.mkdir(parents=True)
            save_file(model.state_dict(), path / "model.safetensors")
        self.tensors = [read_tensors(folder / loss / str(seed)) for seed in range(3)]

    def merge(self, initial=(1, 1, 1), dtype=torch.float32):
        """Return a model and the merge that writes to it: all weights in one group."""
        model = _model(self.loss, 9).to(dtype)
        blends = [Blend(name, [StoredSource(tensors[name]) for tensors in self.tensors]) for name in self.tensors[0]]
        return model, LearnedMerge(model, [BlendGroup("model", SoftmaxCoefficients(initial), blends)])

    def teacher(self, mixture):
        return self.merge([max(share, 1e-9) for share in mixture])[0].eval()


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("sources"), {}

    def of(loss):
        if loss not in made:
            made[loss] = _Sources(loss, folder)
        return made[loss]

    return of


def _text(generator, num_words):
    return " ".join(generator.choices(WORDS, k=num_words))


def _conversations(num_pairs, seed=0):
    generator = random.Random(seed)
    return [
        {
            "prompt": [{"role": "user", "content": _text(generator, 4)}],
            "chosen": [{"role": "assistant", "content": _text(generator, generator.randint(2, 6))}],
            "rejected": [{"role": "assistant", "content": _text(generator, generator.randint(2, 6))}],
            "source": "made",
        }
        for _ in range(num_pairs)
    ]


def _ids(tokenizer, messages):
    return torch.tensor([tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]])


@torch.no_grad()
def _reward(model, tokenizer, pair, side):
    """Return the score of an answer by a reward model, or its log-probability with its prompt by a language model."""
    ids = _ids(tokenizer, pair["prompt"] + pair[side])
    if isinstance(model, Qwen2ForSequenceClassification):
        return model(ids).logits.item()
    return model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum().item()


def _judged(pairs, margin):
    """Return `pairs` with the answers in the order that `margin` of a pair says."""
    return Dataset.from_list(
        [
            pair if margin(pair) > 0 else pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]}
            for pair in pairs
        ]
    )


@torch.no_grad()
def _written(model, num_blocks, block_size=24):
    """Return text that `model` wrote."""
    torch.manual_seed(0)
    tokens = torch.randint(3, SHAPE["vocab_size"], (num_blocks, 1))
    while tokens.shape[1] < block_size:
        logits = model(tokens).logits[:, -1]
        tokens = torch.cat([tokens, logits.softmax(-1).multinomial(1)], dim=1)
    return Dataset.from_list([{"input_ids": row} for row in tokens.tolist()])


def _margin(loss, tokenizer, model, reference):
    def margin(pair):
        value = _reward(model, tokenizer, pair, "chosen") - _reward(model, tokenizer, pair, "rejected")
        if loss == "dpo":
            value -= _reward(reference, tokenizer, pair, "chosen") - _reward(reference, tokenizer, pair, "rejected")
        return value

    return margin


def _data(loss, sources, tokenizer, mixture, num_rows=80):
    teacher = sources.teacher(mixture)
    if loss == "lm":
        return _written(teacher, num_rows)
    return _judged(_conversations(num_rows), _margin(loss, tokenizer, teacher, sources.models[0]))


def _split(data, settings):
    """Return `data` as it is split where no two pairs have a prompt in common."""
    return split(data, None, settings)


def _settings(loss, **changes):
    return FitSettings(**{"loss": loss, "max_steps": 20, "batch_size": 8, "max_length": 128, "seed": 3, **changes})


@pytest.mark.parametrize("loss", ["bradley_terry", "lm", "dpo"])
def test_the_source_that_is_right_is_found(loss, sources, tokenizer):
    sources = sources(loss)
    data = _data(loss, sources, tokenizer, [0, 1, 0])
    model, merge = sources.merge()
    record = fit_coefficients(
        merge, model, tokenizer, data, _settings(loss, max_steps=12, learning_rate=0.5), sources.models[0]
    )
    first, right, last = record.final["model"]
    assert right > 0.75 > 0.25 > first + last
    assert record.after["loss"] < record.before["loss"] - 0.03
    if loss != "lm":
        assert record.after["accuracy"] > max(record.before["accuracy"], 0.85)
    assert record.final == merge.values()
    assert record.largest_move == pytest.approx(right - 1 / 3)
    assert record.largest_relative_move == pytest.approx(3 * right - 1)


def test_a_mixture_is_found(sources, tokenizer):
    sources, mixture = sources("lm"), [0.6, 0.3, 0.1]
    model, merge = sources.merge()
    settings = _settings("lm", max_steps=30, learning_rate=0.2, batch_size=32)
    record = fit_coefficients(merge, model, None, _data("lm", sources, tokenizer, mixture, 320), settings)
    assert record.final["model"] == pytest.approx(mixture, abs=0.06)


@pytest.mark.parametrize("loss", ["bradley_terry", "lm", "dpo"])
def test_held_out_figures_are_those_of_the_model(loss, sources, tokenizer):
    sources = sources(loss)
    data = _data(loss, sources, tokenizer, [0, 1, 0], 45)
    model, merge = sources.merge()
    settings = _settings(loss, max_steps=2, beta=0.3, batch_size=4)
    record = fit_coefficients(merge, model, tokenizer, data, settings, sources.models[0])
    # Two batches of four, and one that is left over.
    assert (record.num_train, record.num_heldout) == (36, 9)
    heldout = _split(data, settings)[1]
    if loss == "lm":
        tokens = torch.tensor(heldout["input_ids"])
        expected = {"loss": model(tokens, labels=tokens).loss.item()}
    else:
        margins = torch.tensor([_margin(loss, tokenizer, model, sources.models[0])(pair) for pair in heldout])
        scale = settings.beta if loss == "dpo" else 1.0
        expected = {
            "loss": -torch.nn.functional.logsigmoid(scale * margins).mean().item(),
            "accuracy": (margins > 0).float().mean().item(),
        }
    assert record.after == pytest.approx(expected, rel=1e-4)


def test_a_merge_is_its_own_reference_without_another(sources, tokenizer):
    sources = sources("dpo")
    data = _data("dpo", sources, tokenizer, [0, 1, 0], 20)
    model, merge = sources.merge()
    start = copy.deepcopy(model)
    settings = _settings("dpo", max_steps=3, batch_size=4)
    record = fit_coefficients(merge, model, tokenizer, data, settings)
    assert record.before == {"loss": pytest.approx(np.log(2), rel=1e-5)}
    margins = torch.tensor([_margin("dpo", tokenizer, model, start)(pair) for pair in _split(data, settings)[1]])
    expected = -torch.nn.functional.logsigmoid(settings.beta * margins).mean().item()
    assert record.after["loss"] == pytest.approx(expected, rel=1e-4) != record.before["loss"]


def test_the_record_has_every_step(sources, tokenizer, tmp_path):
    sources = sources("bradley_terry")
    data = _data("bradley_terry", sources, tokenizer, [0, 1, 0], 20)
    model, merge = sources.merge([1, 2, 5])
    settings = _settings("bradley_terry", max_steps=5, warmup_steps=0, batch_size=16, holdout=0.2)
    record = fit_coefficients(merge, model, tokenizer, data, settings)
    # All data are in one batch: the first loss is that of the merge that it began as.
    training = _split(data, settings)[0]
    margins = torch.tensor(
        [_margin("bradley_terry", tokenizer, sources.teacher([1, 2, 5]), None)(p) for p in training]
    )
    assert record.steps[0].loss == pytest.approx(-torch.nn.functional.logsigmoid(margins).mean().item(), rel=1e-4)
    assert len(record.steps) == 5
    assert record.initial["model"] == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    trajectory = [record.initial, *(step.coefficients for step in record.steps)]
    assert all(first != second for first, second in itertools.pairwise(trajectory))
    assert all(step.gradient_norm > 0 for step in record.steps)
    result = json.loads(json.dumps(record.to_dict()))
    assert result["final"] == {name: list(values) for name, values in merge.values().items()}
    assert result["steps"][4]["coefficients"] == result["final"]
    assert result["settings"]["loss"] == "bradley_terry"
    assert result["heldout"]["after"]["loss"] == record.after["loss"]
    plot_fit(record, tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["fit.png"]


def test_gradient_norms_are_of_the_logits(sources):
    sources = sources("lm")
    data = _written(sources.models[1], 16)
    model, merge = sources.merge()
    settings = _settings("lm", max_steps=1, warmup_steps=0, batch_size=12, holdout=0.25)
    tokens = torch.tensor(_split(data, settings)[0]["input_ids"])
    other_model, other = sources.merge()
    other_model(tokens, labels=tokens).loss.backward()
    other.collect()
    record = fit_coefficients(merge, model, None, data, settings)
    assert record.steps[0].gradient_norm == pytest.approx(other.gradient_norm(), rel=1e-4)


@pytest.mark.parametrize(
    "changes",
    [{"gradient_checkpointing": True}, {"batch_size": 4, "gradient_accumulation_steps": 2}],
    ids=["checkpointing", "accumulation"],
)
def test_what_saves_memory_changes_little(sources, changes):
    sources = sources("lm")
    data = _written(sources.models[1], 40)
    finals = []
    for extra in ({}, changes):
        model, merge = sources.merge()
        settings = _settings("lm", max_steps=4, **extra)
        finals.append(fit_coefficients(merge, model, None, data, settings).final["model"])
    assert finals[0] == pytest.approx(finals[1], abs=1e-4)


def test_coefficients_that_hardly_move_are_warned_of(sources):
    sources = sources("lm")
    data, progress = _written(sources.models[1], 20), _Warnings()
    for learning_rate in (1e-5, 0.1):
        model, merge = sources.merge()
        settings = _settings("lm", max_steps=4, learning_rate=learning_rate)
        fit_coefficients(merge, model, None, data, settings, progress=progress)
    [warning] = progress.warnings
    assert warning.startswith("No coefficient moved by 1% of itself (at most 0.0")


def test_a_loss_that_does_not_fall_is_warned_of(sources, monkeypatch):
    sources = sources("lm")
    data, progress = _written(sources.models[1], 20), _Warnings()
    for after in (0.5, 0.4):
        measured = iter([{"loss": 0.5}, {"loss": after}])
        monkeypatch.setattr(fitting, "_measured", lambda *arguments, measured=measured: next(measured))
        model, merge = sources.merge()
        fit_coefficients(merge, model, None, data, _settings("lm", max_steps=2, learning_rate=0.5), progress=progress)
    [warning] = progress.warnings
    assert warning.startswith("On what was held out the loss did not fall (0.5000 before, 0.5000 after)")


def test_losses_and_noise_of_routers_are_left_out(tmp_path):
    folders = [tmp_path / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        losses = {"router_aux_loss_coef": 0.5, "output_router_logits": True}
        write_checkpoint(folder, "linear", seed, router_jitter_noise=0.5, **losses)
    series = open_checkpoints([str(folder) for folder in folders])
    model = load_model(str(folders[0]), series.sources[0].config, dtype=torch.float32, device="cpu", own_code=False)
    merge = LearnedMerge(model, series.groups([1, 1]))
    data = Dataset.from_list([{"input_ids": list(range(number, number + 24))} for number in range(3, 23)])
    settings = _settings("lm", max_steps=1, warmup_steps=0, batch_size=16, learning_rate=1e-9)
    record = fit_coefficients(merge, model, None, data, settings)
    tokens = torch.tensor(_split(data, settings)[0]["input_ids"])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(
            model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        assert record.steps[0].loss == pytest.approx(expected.item(), rel=1e-4)
        assert model(tokens, labels=tokens).loss > expected + 0.1
    assert model.config.router_aux_loss_coef == model.config.router_jitter_noise == 0.5


@pytest.mark.parametrize("loss", ["bradley_terry", "dpo"])
def test_the_same_again_and_nothing_else_is_changed(loss, sources, tokenizer, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = sources(loss)
    data = _data(loss, sources, tokenizer, [0, 1, 0], 20)
    reference = sources.models[0]
    records = []
    for _ in range(2):
        model, merge = sources.merge()
        torch.manual_seed(5), random.seed(5), np.random.seed(5)
        records.append(fit_coefficients(merge, model, tokenizer, data, _settings(loss, max_steps=3), reference))
        drawn = torch.rand(()).item(), random.random(), np.random.random()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    assert drawn == (torch.rand(()).item(), random.random(), np.random.random())
    assert records[0] == records[1]
    # A copy of a model that trl gave another forward would run the old weights.
    clone = copy.deepcopy(model)
    ids = _ids(tokenizer, data[0]["prompt"] + data[0]["chosen"])
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
        assert clone(ids).logits.abs().max() == 0
        assert model(ids).logits.abs().max() > 0
    assert not model.training
    assert not reference.training
    assert "forward" not in model.__dict__ | reference.__dict__
    assert not list(tmp_path.iterdir())
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_a_bfloat16_model_learns_too(sources):
    sources = sources("lm")
    model, merge = sources.merge(dtype=torch.bfloat16)
    data = _written(sources.models[1], 40)
    record = fit_coefficients(merge, model, None, data, _settings("lm", learning_rate=0.3))
    assert record.final["model"][1] > 0.75
    assert model.dtype == torch.bfloat16


def test_pairs_that_are_too_long_are_told_of(sources, tokenizer):
    for loss, told in (("bradley_terry", "2 of 22 pairs are longer"), ("dpo", "2 of 22 pairs have prompts of")):
        model, merge = sources(loss).merge()
        pairs = _conversations(22)
        for pair in pairs[:2]:
            pair["prompt"][0]["content"] *= 30
        progress = _Warnings()
        settings = _settings(loss, max_steps=2, max_length=100, batch_size=2)
        record = fit_coefficients(merge, model, tokenizer, Dataset.from_list(pairs), settings, progress=progress)
        assert told in progress.warnings[0]
        assert record.num_train + record.num_heldout == 20
        settings = _settings(loss, max_length=5)
        with pytest.raises(SettingsError, match="max_length=5 tokens"):
            fit_coefficients(merge, model, tokenizer, Dataset.from_list(pairs), settings, progress=progress)


def test_what_does_not_fit_is_refused(sources, tokenizer, monkeypatch):
    pairs = Dataset.from_list(_conversations(10))
    classifier, classifier_merge = sources("bradley_terry").merge()
    model, merge = sources("dpo").merge()

    def refused(message, merge, model, settings, tokenizer=tokenizer, data=pairs):
        with pytest.raises(SettingsError, match=message) as error:
            fit_coefficients(merge, model, tokenizer, data, settings)
        assert "\n" not in str(error.value)

    refused("loss='bradley_terry' cannot train a Qwen2ForCausalLM", merge, model, _settings("bradley_terry"))
    refused("loss='dpo' cannot train a Qwen2ForSequence", classifier_merge, classifier, _settings("dpo"))
    refused("leaves 10 to learn from and 0 to measure", merge, model, _settings("dpo", holdout=0.01))
    untold = copy.deepcopy(tokenizer)
    untold.chat_template = None
    refused("has no chat template", merge, model, _settings("dpo"), untold)
    classifier.config.num_labels = 2
    refused("with num_labels=2", classifier_merge, classifier, _settings("bradley_terry"))
    monkeypatch.setitem(sys.modules, "trl", None)
    refused(r"needs trl .*pip install 'upcycled-moe\[preference\]'", merge, model, _settings("dpo"))


def test_pairs_of_one_prompt_stay_together():
    prompts = [str(number % 7) for number in range(40)]
    data = Dataset.from_dict({"row": list(range(40))})
    parts = split(data, prompts, _settings("dpo", holdout=0.3))
    learned, heldout = (part["row"] for part in parts)
    assert sorted([*learned, *heldout]) == list(range(40))
    assert 6 <= len(heldout) <= 12
    assert not {prompts[row] for row in learned} & {prompts[row] for row in heldout}
    # A share too small for any prompt takes the smallest.
    _, heldout = split(data, ["many"] * 38 + ["few"] * 2, _settings("dpo", holdout=0.03))
    assert heldout["row"] == [38, 39]


@pytest.mark.parametrize("loss", ["bradley_terry", "dpo"])
def test_pairs_of_a_single_prompt_leave_none_to_measure_on(loss, sources, tokenizer):
    model, merge = sources(loss).merge()
    long, *pairs = _conversations(11)
    for pair in pairs:
        pair["prompt"] = pairs[0]["prompt"]
    long["prompt"][0]["content"] *= 30  # left out, and its prompt with it
    with pytest.raises(SettingsError, match="All 10 pairs are of one prompt"):
        fit_coefficients(merge, model, tokenizer, Dataset.from_list([long, *pairs]), _settings(loss, max_length=100))


def test_a_reward_model_is_fit_on_the_token_that_it_pads_with(sources, tokenizer):
    model, merge = sources("bradley_terry").merge()
    pairs = Dataset.from_list(_conversations(10))
    # A token that stands in every conversation, and at the end of none.
    model.config.pad_token_id = pad_id = _ids(tokenizer, pairs[0]["prompt"] + pairs[0]["chosen"])[0, 0].item()
    fit_coefficients(merge, model, tokenizer, pairs, _settings("bradley_terry", max_steps=1))
    assert tokenizer.pad_token_id == model.config.pad_token_id == pad_id != byte_level_tokenizer().pad_token_id
    ending = _ids(tokenizer, pairs[0]["prompt"] + pairs[0]["chosen"])[0, -1].item()
    for pad_id, problem in ((None, "no token of its tokenizer"), (ending, "which conversations end with")):
        model.config.pad_token_id = pad_id
        with pytest.raises(SettingsError, match=f"pad_token_id={pad_id} in config.json is .*{problem}.* such as "):
            fit_coefficients(merge, model, tokenizer, pairs, _settings("bradley_terry"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("loss", "hinge"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", 1e40),
        ("beta", -1.0),
        ("max_steps", 0),
        ("batch_size", 0),
        ("warmup_steps", 101),
        ("holdout", 0.0),
        ("holdout", 1.0),
    ],
)
def test_settings_outside_their_range_are_refused(setting, value):
    with pytest.raises(SettingsError, match=f"{setting}="):
        FitSettings(**{setting: value})
