"""Learned merges: what they are made of, that they find the experts that are right, and what they write."""

import copy
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from dense_checkpoints import FAMILIES, SHAPE, byte_level_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForSequenceClassification

from upcycled_moe.common.learned_merge.merge import LearnedMerge
from upcycled_moe.common.moe_source import open_moe
from upcycled_moe.common.progress import Progress
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.text_settings import TextSettings
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.source import open_source
from upcycled_moe.merging import learning
from upcycled_moe.merging.coefficients import MergeCoefficients, average_coefficients
from upcycled_moe.merging.layout import expert_layout
from upcycled_moe.merging.learned_ffns import LEAST_INITIAL_SHARE, LearnedFfns
from upcycled_moe.merging.learned_files import FIT_FILE, FIT_PLOT, LEARNED_COEFFICIENTS
from upcycled_moe.merging.learning import dense_model, initial_coefficients, learn_coefficients
from upcycled_moe.merging.lessons import Lesson, read_lesson
from upcycled_moe.merging.merge import merge, plan_merge
from upcycled_moe.merging.settings import SHARED_EXPERT_WEIGHT, LearnSettings, MergeSettings
from upcycled_moe.merging.usage import coefficients_by_usage, measure_coefficients
from upcycled_moe.preference.settings import FitSettings, PairSettings


MATRICES = ("gate_proj", "up_proj", "down_proj")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Of the four experts below, the one that stays what the dense model's FFN was.
RIGHT = 2


def _tokenizer(folder):
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """Folder of a dense reward model."""
    folder = tmp_path_factory.mktemp("reward") / "dense"
    torch.manual_seed(0)
    shape = {**SHAPE, "initializer_range": 0.3}
    config = Qwen2Config(**shape, num_labels=1, pad_token_id=byte_level_tokenizer().pad_token_id)
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Folder of a dense language model with tied embeddings, which is sure of what it says."""
    folder = tmp_path_factory.mktemp("language") / "dense"
    torch.manual_seed(0)
    config_class, model_class, fields = FAMILIES["qwen2"]
    model_class(config_class(**{**SHAPE, **fields, "initializer_range": 0.3})).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def _spoilt(dense, folder, right=RIGHT, scale=0.5, **settings):
    """Convert `dense`, and add noise to all experts but `right`, of about the size of their weights."""
    recipe = ConversionRecipe(**{"num_experts": 4, "router": "linear", **settings})
    convert(open_source(str(dense)), recipe, folder)
    path = folder / "model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if ".mlp.experts." in name:
            noise = scale * value.float().std() * torch.randn(value.shape, generator=generator)
            noise[[right] if right is not None else []] = 0
            tensors[name] = (value.float() + noise).to(value.dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return open_moe(str(folder))


def _fit(loss, **settings):
    return FitSettings(loss, **{"max_steps": 20, "learning_rate": 0.3, "max_length": 64, "holdout": 0.25, **settings})


KINDS = {
    "experts": {},
    "sigmoid": {"shared_expert": "sigmoid"},
    "slices beside a shared expert": {
        "experts": "split",
        "num_experts": 6,
        "expert_granularity": 3,
        "shared_expert": "plain",
    },
    "some layers": {"moe_layers": [1]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", ["layer", "matrix"])
def test_the_model_that_learns_is_the_one_that_is_written(language_model, tmp_path, kind, per):
    """Wherever its coefficients are: the same parts, factors and places as in the merge."""
    source = _spoilt(language_model, tmp_path / "moe", right=None, **KINDS[kind])
    layout = expert_layout(source)
    initial = average_coefficients(layout)
    if layout.has_shared_expert:
        initial = MergeCoefficients(initial.layers, dict.fromkeys(layout.moe_layers, 0.3))
    ffns = LearnedFfns(source, layout, initial, per)
    generator = torch.Generator().manual_seed(1)
    for group in ffns.groups:
        group.coefficients.logits.data += torch.randn(group.coefficients.logits.shape, generator=generator)
    model = dense_model(source, layout)
    LearnedMerge(model, ffns.groups)
    coefficients = ffns.coefficients()
    assert len(ffns.groups) == len(layout.moe_layers) * layout.num_slices * (3 if per == "matrix" else 1)
    for matrices in coefficients.layers.values():
        assert len(set(matrices.values())) == (3 if per == "matrix" else 1)
        assert all(abs(sum(values) - 1) < 1e-12 for values in matrices.values())
    coefficients.save(tmp_path / "given.json")
    merge(plan_merge(source, _given(tmp_path / "given.json"), tmp_path / "out", 10**9), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in model.state_dict().items():
        if name in written:  # the head is tied
            torch.testing.assert_close(value, written[name], rtol=1e-5, atol=1e-6)
    assert set(written) <= set(model.state_dict())


def _given(path):
    return MergeSettings("coefficients", coefficients=path)


def test_bfloat16_is_learned_in_float32(dense, tmp_path):
    source = _spoilt(dense("qwen3", dtype=torch.bfloat16), tmp_path / "moe")
    layout = expert_layout(source)
    model = dense_model(source, layout)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    LearnedMerge(model, LearnedFfns(source, layout, average_coefficients(layout), "layer").groups)
    experts = source.tensors["model.layers.1.mlp.experts.down_proj"].load().float()
    torch.testing.assert_close(model.model.layers[1].mlp.down_proj.weight, experts.mean(0), rtol=1e-6, atol=1e-7)


def test_experts_without_any_use_start_above_zero(language_model, tmp_path):
    source = _spoilt(language_model, tmp_path / "moe")
    layout = expert_layout(source)
    initial = MergeCoefficients.alike(dict.fromkeys(layout.moe_layers, (0.0, 0.75, 0.25, 0.0)))
    values = LearnedFfns(source, layout, initial, "layer").coefficients().layers[0]["up_proj"]
    lifted = LEAST_INITIAL_SHARE / 4
    assert values == pytest.approx([each / (1 + 2 * lifted) for each in (lifted, 0.75, 0.25, lifted)], rel=1e-6)


def _sampled(model, num_blocks, length, seed=0):
    """Return blocks of tokens as `model` says them."""
    torch.manual_seed(seed)
    begin = torch.randint(0, SHAPE["vocab_size"], (num_blocks, 1))
    tokens = model.generate(
        begin,
        attention_mask=torch.ones_like(begin),
        do_sample=True,
        max_new_tokens=length - 1,
        min_new_tokens=length - 1,
        pad_token_id=0,
    )
    return Dataset.from_dict({"input_ids": tokens.tolist()})


def _answers(count, seed=0):
    """Return pairs of different answers to one question."""
    generator = torch.Generator().manual_seed(seed)
    words = ("the", "of", "and", "to", "is", "that", "it", "was", "for", "had")

    def text():
        return " ".join(words[at] for at in torch.randint(0, len(words), (6,), generator=generator).tolist())

    return [
        {
            "prompt": [{"role": "user", "content": text()}],
            "chosen": [{"role": "assistant", "content": text()}],
            "rejected": [{"role": "assistant", "content": f"{text()} {text()}"}],
        }
        for _ in range(count)
    ]


def _judged(pairs, score):
    """Return `pairs` with the answer of the higher score as the chosen one."""
    names = ("chosen", "rejected")
    scores = score([pair["prompt"] + pair[name] for name in names for pair in pairs]).view(2, -1)
    judged = []
    for pair, is_swapped in zip(pairs, scores[1] > scores[0], strict=True):
        swapped = {"chosen": pair["rejected"], "rejected": pair["chosen"]} if is_swapped else {}
        judged.append({**pair, **swapped, "source": "test"})
    return Dataset.from_list(judged)


@torch.no_grad()
def _log_probabilities(model, inputs):
    """Return the sum over the tokens of each conversation; prompts are those of both models."""
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    log_probabilities = model(**inputs).logits.log_softmax(-1)[:, :-1]
    chosen = log_probabilities.gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
    return (chosen * inputs["attention_mask"][:, 1:]).sum(1)


def _lesson(loss, dense, source):
    """Return data of which the dense model, and with it one expert, is the best model."""
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATE

    def rendered(conversations):
        options = {"return_dict": True, "return_tensors": "pt", "padding": True}
        return tokenizer.apply_chat_template(conversations, **options, tokenizer_kwargs={"padding_side": "right"})

    if loss == "bradley_terry":
        judge = Qwen2ForSequenceClassification.from_pretrained(dense)
        with torch.no_grad():
            return Lesson(tokenizer, _judged(_answers(160), lambda all: judge(**rendered(all)).logits[:, 0]), {})
    model = AutoModelForCausalLM.from_pretrained(dense)
    if loss == "lm":
        return Lesson(tokenizer, _sampled(model, 64, 32), {})
    layout = expert_layout(source)
    reference = dense_model(source, layout)
    LearnedMerge(reference, LearnedFfns(source, layout, _initial(source, layout), "layer").groups)

    def margins(conversations):
        inputs = rendered(conversations)
        return _log_probabilities(model, inputs) - _log_probabilities(reference, inputs)

    return Lesson(tokenizer, _judged(_answers(160), margins), {})


def _initial(source, layout):
    """Return uniform coefficients, with λ low enough for the others to show."""
    initial = average_coefficients(layout)
    shared = dict.fromkeys(layout.moe_layers, 0.2) if layout.has_shared_expert else None
    return MergeCoefficients(initial.layers, shared)


@pytest.mark.parametrize("loss", ["lm", "bradley_terry", "dpo"])
def test_the_expert_that_is_right_comes_to_count_most(request, tmp_path, loss):
    dense = request.getfixturevalue("reward_model" if loss == "bradley_terry" else "language_model")
    source = _spoilt(dense, tmp_path / "moe", shared_expert="plain" if loss == "lm" else "none")
    layout = expert_layout(source)
    data = [""] if loss != "lm" else []
    settings = LearnSettings(TextSettings(data) if loss == "lm" else PairSettings(data), _fit(loss))
    lesson = _lesson(loss, dense, source)
    initial = _initial(source, layout)
    coefficients, record = learn_coefficients(source, layout, settings, lesson, initial, Progress())
    right = [matrices["up_proj"][RIGHT] for matrices in coefficients.layers.values()]
    assert min(right) > 0.3, coefficients.layers
    assert max(right) > 0.5
    assert record.after["loss"] < record.before["loss"]
    assert coefficients.shared == initial.shared
    if loss == "lm":
        assert learn_coefficients(source, layout, settings, lesson, initial, Progress())[0] == coefficients


@pytest.fixture(scope="module")
def learned(language_model, text_file, tmp_path_factory):
    """A source with a shared expert, the plan of a learned merge of it, and the folder that it was written to."""
    folder = tmp_path_factory.mktemp("learned")
    source = _spoilt(language_model, folder / "moe", shared_expert="sigmoid")
    learn = LearnSettings(_text(text_file), _fit("lm", max_steps=3, learning_rate=1.0), initial="usage")
    plan = plan_merge(source, MergeSettings("learned", learn=learn), folder / "out", 10**9)
    merge(plan, folder / "out", save_coefficients=folder / "saved.json")
    return source, plan, folder / "out"


def _text(text_file):
    return TextSettings([str(text_file)], tokens_per_domain=512, block_size=32)


def test_learned_coefficients_that_are_given_again_give_the_same_weights(learned, tmp_path):
    source, plan, out = learned
    assert (out / LEARNED_COEFFICIENTS).read_bytes() == (out.parent / "saved.json").read_bytes()
    merge(plan_merge(source, _given(out / LEARNED_COEFFICIENTS), tmp_path / "again", 10**9), tmp_path / "again")
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (out / weights).read_bytes()
    assert plan.coefficients.shared == dict.fromkeys(range(3), SHARED_EXPERT_WEIGHT)


def test_a_learned_merge_tells_how_it_was_learned(learned):
    _, plan, out = learned
    fit = json.loads((out / FIT_FILE).read_text())
    assert len(fit["steps"]) == 3
    assert fit["final"] == fit["steps"][-1]["coefficients"]
    for layer_idx, matrices in plan.coefficients.layers.items():
        shared, *others = fit["final"][f"layer {layer_idx}"]
        assert shared == pytest.approx(SHARED_EXPERT_WEIGHT)
        assert others == pytest.approx([(1 - SHARED_EXPERT_WEIGHT) * value for value in matrices["gate_proj"]])
    assert (out / FIT_PLOT).read_bytes().startswith(b"\x89PNG")
    step = json.loads((out / "upcycling.json").read_text())["steps"][-1]
    assert (step["method"], step["learn"]["fit"]["loss"], step["learn"]["per"]) == ("learned", "lm", "layer")
    assert step["fit"] == {name: fit[name] for name in step["fit"]}
    assert {"heldout", "largest_move"} <= step["fit"].keys()
    assert "**merge** back to a dense model, by `learned`" in (out / "README.md").read_text()


def test_learning_starts_from_what_routers_do_with_the_data(learned, text_file):
    source, plan, _ = learned
    measured = measure_coefficients(source, expert_layout(source), _text(text_file), Progress())[0]
    for layer_idx, matrices in measured.layers.items():
        shared, *others = plan.chosen.fit.initial[f"layer {layer_idx}"]
        assert others == pytest.approx([(1 - shared) * value for value in matrices["up_proj"]], rel=1e-5)
        assert len({round(value, 4) for value in others}) > 1


def test_routers_see_both_answers_of_a_pair(reward_model, tmp_path):
    """Those of a pair are what the routers are asked about, each as one conversation."""
    source = _spoilt(reward_model, tmp_path / "moe")
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({**pair, "prompt": pair["prompt"][0]["content"]}) + "\n" for pair in _answers(4))
    )
    learn = LearnSettings(PairSettings([str(path)]), _fit("bradley_terry"), initial="usage")
    lesson = read_lesson(source, learn)
    texts = [lesson.tokenizer.decode(block["input_ids"]) for block in lesson.blocks["pairs"]]
    pairs = _answers(4)
    rendered = [
        lesson.tokenizer.apply_chat_template(pair["prompt"] + pair[name], tokenize=False)
        for pair in pairs
        for name in ("chosen", "rejected")
    ]
    assert sorted(texts) == sorted(rendered)
    layout = expert_layout(source)
    expected = coefficients_by_usage(source, layout, lesson.blocks, 1, "float32", Progress())
    actual = initial_coefficients(source, layout, learn, lesson, Progress())
    for layer_idx, matrices in expected.layers.items():
        assert actual.layers[layer_idx]["up_proj"] == pytest.approx(matrices["up_proj"], rel=1e-5)


def test_a_reference_of_its_own_is_what_dpo_compares_with(language_model, tmp_path):
    """With the right model as the reference, the loss at the start is that of the merge against it."""
    source = _spoilt(language_model, tmp_path / "moe")
    layout = expert_layout(source)
    lesson = _lesson("dpo", language_model, source)
    pairs = lesson.data.select(range(16))
    settings = LearnSettings(
        PairSettings(["pairs"]), _fit("dpo", max_steps=1, batch_size=4), reference=str(language_model)
    )
    _, record = learn_coefficients(
        source, layout, settings, replace(lesson, data=pairs), _initial(source, layout), Progress()
    )
    # Every pair was judged by how much more than the merge the reference likes an answer.
    assert record.before["accuracy"] == 0
    assert record.before["loss"] > math.log(2) + 0.01


REFUSED = {
    "reward loss of a language model": (
        "language_model",
        {},
        {"fit": FitSettings("bradley_terry")},
        "loss='bradley_terry' needs a reward model",
    ),
    "text loss of a reward model": (
        "reward_model",
        {},
        {"data": TextSettings(["x"]), "fit": FitSettings("lm")},
        "loss='lm' needs a language model; choose bradley_terry",
    ),
    "one copy": (
        "reward_model",
        {"experts": "split", "num_experts": 4, "expert_granularity": 4, "num_experts_per_tok": 4},
        {},
        "has one copy of each slice of an FFN",
    ),
    "no shared expert": ("reward_model", {}, {"shared_expert_weight": 0.5}, "has no shared expert for"),
    "missing pairs": ("reward_model", {}, {}, "no.parquet"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_learned_is_told_before_anything_is(request, tmp_path, monkeypatch, kind):
    dense, recipe, fields, message = REFUSED[kind]
    source = _spoilt(request.getfixturevalue(dense), tmp_path / "moe", right=None, **recipe)
    monkeypatch.setattr(learning, "dense_model", pytest.fail)
    learn = LearnSettings(**{"data": PairSettings(["no.parquet"]), "fit": FitSettings("bradley_terry"), **fields})
    with pytest.raises(SettingsError, match=re.escape(message)):
        plan_merge(source, MergeSettings("learned", learn=learn), tmp_path / "out", 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_a_reference_that_says_nothing_is_refused_before_data_is_read(language_model, reward_model, tmp_path):
    source = _spoilt(language_model, tmp_path / "moe")
    learn = LearnSettings(PairSettings(["no.parquet"]), FitSettings("dpo"), reference=str(reward_model))
    with pytest.raises(SettingsError, match="is a Qwen2ForSequenceClassification; give a language model"):
        plan_merge(source, MergeSettings("learned", learn=learn), tmp_path / "out", 10**9, learn=False)


def test_a_reward_model_without_padding_is_refused(reward_model, tmp_path):
    source = _spoilt(reward_model, tmp_path / "moe")
    source.config.pad_token_id = None
    with pytest.raises(SettingsError, match=r"moe: pad_token_id=None in config\.json is no token"):
        read_lesson(source, LearnSettings(PairSettings(["no.parquet"]), FitSettings("bradley_terry")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per": "tensor"}, "per='tensor': choose one of layer, matrix, model"),
        ({"initial": "zero"}, "initial='zero': choose one of uniform, usage"),
        ({"shared_expert_weight": 1.0}, "shared_expert_weight=1.0 is outside [0, 1)"),
        ({"data": TextSettings(["x"])}, "loss='bradley_terry' is computed on preference pairs"),
        ({"reference": "x"}, "--reference has no meaning with --loss bradley_terry, only with dpo"),
    ],
)
def test_settings_of_learning_that_cannot_be_are_refused(settings, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        LearnSettings(**{"data": PairSettings(["x"]), "fit": FitSettings("bradley_terry"), **settings})
