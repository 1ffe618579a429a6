"""The analysis of checkpoints on disk: what is reported, what is refused, and what is held meanwhile."""

import json
import shutil
import weakref
from contextlib import contextmanager

import pytest
import torch
from dense_checkpoints import byte_level_tokenizer, write_dense
from moe_checkpoints import DOMAINS, KINDS, make_model
from safetensors.torch import load_file, save_file

from upcycled_moe.analysis import analyze as analyze_module
from upcycled_moe.analysis.analyze import analyze
from upcycled_moe.analysis.measures import MEASURES
from upcycled_moe.analysis.results import AnalysisReport
from upcycled_moe.analysis.settings import AnalysisSettings
from upcycled_moe.common.progress import Progress
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.source import open_source


@pytest.fixture
def settings(labelled_text):
    """`settings(**changes)`: a short analysis of the labelled text."""

    def make(**changes):
        return AnalysisSettings(**{"data": [str(labelled_text)], "tokens_per_domain": 256, **changes})

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_gets_every_measure(moe_checkpoint, settings, kind):
    path = moe_checkpoint(kind)
    report = analyze([str(path)], settings())
    assert report.domains == list(DOMAINS)
    (result,) = report.checkpoints
    assert (result.name, result.path) == (path.name, str(path))
    assert result.num_experts == (6 if kind == "zero experts" else 4)
    assert result.num_tokens == dict.fromkeys(DOMAINS, 256)
    assert list(result.measures) == [measure.name for measure in MEASURES]
    for measure in MEASURES:
        per_layer = result.measures[measure.name].per_layer
        assert set(per_layer) == {figure.name for figure in measure.figures}
        assert all(len(values) == len(result.layers) for values in per_layer.values())
    load = torch.tensor(result.measures["routing"].tables["load"])  # [L, E]
    assert load.shape == (len(result.layers), result.num_experts)
    torch.testing.assert_close(load.sum(dim=1), torch.ones(len(result.layers)))
    assert AnalysisReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_checkpoints_are_named_and_compared(moe_checkpoint, settings):
    first, second = moe_checkpoint("linear"), moe_checkpoint("linear", 1)
    report = analyze([f"a={first}", f"b={first}", str(second)], settings())
    assert [one.name for one in report.checkpoints] == ["a", "b", second.name]
    overlaps = {(one.first, one.second): one.per_layer["router_saturation"] for one in report.comparisons}
    assert list(overlaps) == [("a", "b"), ("a", second.name), ("b", second.name)]
    assert overlaps["a", "b"] == [1.0, 1.0, 1.0]
    assert all(value < 0.9 for value in overlaps["a", second.name])
    assert report.notes == []


def test_checkpoints_that_saw_other_tokens_are_not_compared(moe_checkpoint, settings, tmp_path):
    other = shutil.copytree(moe_checkpoint("linear"), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:10]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    report = analyze([str(moe_checkpoint("linear")), str(other)], settings())
    assert report.comparisons == []
    assert report.comparison_notes == [
        "Not compared with each other token for token, as they differ in tokens: linear_0; other."
    ]
    assert report.checkpoints[0].tokenizer != report.checkpoints[1].tokenizer


def test_one_sentence_says_which_checkpoints_are_not_compared(moe_checkpoint, settings):
    paths = [
        moe_checkpoint("linear"),
        moe_checkpoint("mixture"),
        moe_checkpoint("linear", 1),
        moe_checkpoint("mixtral"),
    ]
    report = analyze([str(path) for path in [*paths, moe_checkpoint("zero experts")]], settings(tokens_per_domain=64))
    assert [(one.first, one.second) for one in report.comparisons] == [
        ("linear_0", "linear_1"),
        ("linear_0", "mixtral_0"),
        ("linear_1", "mixtral_0"),
    ]
    caution, note = report.comparison_notes
    assert caution.startswith("Router saturation matches experts by their number")
    assert note == (
        "Not compared with each other token for token, as they differ in MoE layers or number of experts: "
        "linear_0, linear_1 and mixtral_0; mixture_0; zero_experts_0."
    )


@pytest.mark.parametrize(
    ("tokens_per_domain", "block_size", "num_tokens"),
    [(100, None, 100), (64, 64, 64), (10, 64, 10), (10**6, 50, None)],
)
def test_so_many_tokens_of_each_domain_are_read(moe_checkpoint, settings, tokens_per_domain, block_size, num_tokens):
    report = analyze(
        [str(moe_checkpoint("linear"))], settings(tokens_per_domain=tokens_per_domain, block_size=block_size)
    )
    (result,) = report.checkpoints
    found = set(result.num_tokens.values())
    assert len(found) == 3 if num_tokens is None else found == {num_tokens}
    assert report.settings["block_size"] == (block_size or 64)


def test_a_domain_of_one_short_document_is_enough(moe_checkpoint, settings, tmp_path):
    (tmp_path / "short.txt").write_text("two words")
    report = analyze([str(moe_checkpoint("mixtral"))], settings(data=[str(tmp_path / "short.txt")]))
    assert 2 < report.checkpoints[0].num_tokens["short"] < 12


def test_the_domain_may_be_a_column(moe_checkpoint, settings, tmp_path):
    rows = [{"text": "some words here", "subject": subject} for subject in ("law", "art", "law")]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": [str(tmp_path / "all.jsonl")], "domain_column": "subject"}
    assert analyze([str(moe_checkpoint("linear"))], settings(**changes)).domains == ["art", "law"]


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_the_type_to_compute_in_is_chosen(moe_checkpoint, settings, monkeypatch, dtype):
    found, load_model = [], analyze_module.load_model

    def load(*args, **kwargs):
        found.append(load_model(*args, **kwargs))
        return found[0]

    monkeypatch.setattr(analyze_module, "load_model", load)
    analyze([str(moe_checkpoint("olmoe"))], settings(dtype=dtype))
    assert found[0].dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))


def test_one_model_is_held_at_a_time(moe_checkpoint, settings, monkeypatch):
    models, load_model = [], analyze_module.load_model

    def load(*args, **kwargs):
        assert not any(model() is not None for model in models)
        model = load_model(*args, **kwargs)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(analyze_module, "load_model", load)
    analyze([str(moe_checkpoint(kind)) for kind in ("linear", "mixtral", "top-p")], settings())
    assert len(models) == 3


def test_progress_counts_the_blocks(moe_checkpoint, settings):
    class Counting(Progress):
        def __init__(self):
            self.tasks = []

        @contextmanager
        def task(self, description, total, unit):
            self.tasks.append([description, total, unit, 0])

            def advance(number):
                self.tasks[-1][3] += number

            yield advance

    progress = Counting()
    analyze([f"x={moe_checkpoint('linear')}"], settings(), progress=progress)
    assert progress.tasks == [["Analyzing x", 12, "blocks", 12]]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return write_dense(tmp_path_factory.mktemp("parent") / "dense")


@pytest.fixture
def converted(parent, tmp_path):
    recipe = ConversionRecipe(router="linear", num_experts=4, num_experts_per_tok=2)
    convert(open_source(str(parent)), recipe, tmp_path / "moe")
    return tmp_path / "moe"


def test_the_parent_is_the_one_that_the_conversion_recorded(converted, parent, settings):
    (result,) = analyze([str(converted)], settings()).checkpoints
    assert result.parent == str(parent)
    assert result.measures["expert_weights"].per_layer["parent_divergence"] == [0.0] * 3


def test_a_parent_that_is_named_wins(converted, settings, tmp_path):
    other = write_dense(tmp_path / "other", seed=5)
    (result,) = analyze([str(converted)], settings(parent=str(other))).checkpoints
    assert result.parent == str(other)
    assert min(result.measures["expert_weights"].per_layer["parent_divergence"]) > 0.5


@pytest.mark.parametrize("place", ["elsewhere", "run/checkpoint-7"])
def test_a_parent_that_is_not_here_is_not_compared_with(converted, parent, settings, tmp_path, place):
    """A checkpoint within a run finds what the run's folder says."""
    checkpoint = tmp_path / place
    checkpoint.parent.mkdir(exist_ok=True)
    provenance = json.loads((converted / "upcycling.json").read_text())
    shutil.copytree(converted, checkpoint)
    (checkpoint / "upcycling.json").unlink()
    if place != "elsewhere":
        (checkpoint.parent / "upcycling.json").write_text(json.dumps(provenance))
        assert analyze([str(checkpoint)], settings()).checkpoints[0].parent == str(parent)
    provenance["source"]["name"] = str(tmp_path / "gone")
    (checkpoint / "upcycling.json").write_text(json.dumps(provenance))
    (result,) = analyze([str(checkpoint)], settings()).checkpoints
    assert result.parent is None


def test_a_recorded_parent_that_changed_since_is_not_compared_with(converted, settings, tmp_path):
    retrained = write_dense(tmp_path / "retrained", seed=5)
    provenance = json.loads((converted / "upcycling.json").read_text())
    provenance["source"]["name"] = str(retrained)
    (converted / "upcycling.json").write_text(json.dumps(provenance))

    report = analyze([str(converted)], settings())

    assert report.checkpoints[0].parent is None
    assert "its model.safetensors is not what it was at the conversion" in report.notes[0]


def test_a_recorded_parent_that_cannot_be_read_ends_no_analysis(converted, settings, tmp_path):
    """Its file is what it was, but the index names another."""
    provenance = json.loads((converted / "upcycling.json").read_text())
    broken = shutil.copytree(provenance["source"]["name"], tmp_path / "broken")
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    provenance["source"]["name"] = str(broken)
    (converted / "upcycling.json").write_text(json.dumps(provenance))

    [result] = analyze([str(converted)], settings()).checkpoints

    assert result.parent is None
    assert "gone.safetensors: cannot be read" in result.measures["expert_weights"].notes[0]


def test_a_named_parent_must_have_a_layer_like_the_experts(moe_checkpoint, converted, parent, settings):
    other = str(moe_checkpoint("linear"))
    with pytest.raises(SettingsError, match=f"{parent}: no layer has a feed-forward network of the shape"):
        analyze([other], settings(parent=str(parent)))
    first, second = analyze([str(converted), other], settings(parent=str(parent))).checkpoints
    assert (first.parent, second.parent) == (str(parent), None)


def _without_config(folder):
    (folder / "config.json").unlink()


def _without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _without_weights(folder):
    (folder / "model.safetensors").unlink()


def _larger_tokens(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))


def _nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.gate.weight"][1] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_config, "there is no config.json; give the folder of a finished checkpoint."),
        (_without_tokenizer, "cannot be loaded ("),
        (_without_weights, "cannot be loaded ("),
        (_larger_tokens, "the model's vocab_size is 100; put the model's own tokenizer beside it."),
        (_nan, "the router logits of layer 2 are not finite; compute in float32 (--dtype float32)"),
    ],
)
def test_a_checkpoint_that_cannot_be_looked_into_is_one_line_with_its_name(
    moe_checkpoint, settings, tmp_path, damage, message
):
    folder = shutil.copytree(moe_checkpoint("linear"), tmp_path / "damaged")
    damage(folder)
    with pytest.raises(SettingsError) as error:
        analyze([str(folder)], settings())
    assert str(error.value).startswith(f"{folder}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_needs_no_weights_is_checked_before_any_are_loaded(
    moe_checkpoint, labelled_text, settings, parent, monkeypatch
):
    monkeypatch.setattr(analyze_module, "load_model", lambda *args, **kwargs: pytest.fail("weights are loaded"))
    with pytest.raises(SettingsError, match=f"{parent}: qwen2 models have no MoE layer that can be looked into"):
        analyze([str(moe_checkpoint("linear")), str(parent)], settings())
    with pytest.raises(SettingsError, match=r"block_size=65 exceeds the 64 positions of .*; lower it"):
        analyze([str(moe_checkpoint("linear"))], settings(block_size=65))
    with pytest.raises(SettingsError, match="/no/such/text: no such file or folder"):
        analyze([str(moe_checkpoint("linear"))], settings(data=["/no/such/text"]))
    with pytest.raises(SettingsError, match="/no/such/parent: no such folder"):
        analyze([str(moe_checkpoint("linear"))], settings(parent="/no/such/parent"))
    with pytest.raises(SettingsError, match=f"{labelled_text}: not a checkpoint in safetensors"):
        analyze([str(moe_checkpoint("linear"))], settings(parent=str(labelled_text)))
    with pytest.raises(SettingsError, match="two checkpoints would be called 'x'; name them apart"):
        analyze([f"x={moe_checkpoint('linear')}", f"x={moe_checkpoint('mixtral')}"], settings())


def test_the_shortest_model_sets_the_block_size(moe_checkpoint, settings, tmp_path):
    short = tmp_path / "short"
    make_model("linear", max_position_embeddings=32).save_pretrained(short)
    byte_level_tokenizer().save_pretrained(short)
    report = analyze([str(moe_checkpoint("linear")), str(short)], settings())
    assert report.settings["block_size"] == 32
    assert len(report.comparisons) == 1


@pytest.mark.parametrize("name", ["tokens_per_domain", "block_size", "batch_size"])
def test_numbers_are_above_zero(name):
    with pytest.raises(SettingsError, match=f"{name}=0 must be at least 1"):
        AnalysisSettings(data=["x"], **{name: 0})


def test_an_unknown_type_is_refused():
    with pytest.raises(SettingsError, match="dtype='int8': choose one of auto, float32, bfloat16, float16"):
        AnalysisSettings(data=["x"], dtype="int8")
