"""The merge: copies give the dense model back to the bit, trained experts their weighted mean, all or nothing."""

import json

import pytest
import torch
from dense_checkpoints import folder_hashes, write_dense
from moe_checkpoints import write_checkpoint
from partial_outputs import leave_partial
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2ForSequenceClassification

from upcycled_moe.common.moe_source import open_moe
from upcycled_moe.common.progress import Progress
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.common.streaming import contents
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.source import open_source
from upcycled_moe.conversion.verify import verify
from upcycled_moe.merging import merge as merge_module
from upcycled_moe.merging.coefficients import MergeCoefficients
from upcycled_moe.merging.merge import merge, plan_merge
from upcycled_moe.merging.settings import MergeSettings


MATRICES = ("gate_proj", "up_proj", "down_proj")


def _merged(source, out, settings=None, max_shard_bytes=10**9, **options):
    plan = plan_merge(source, settings or MergeSettings(), out, max_shard_bytes)
    merge(plan, out, **options)
    return plan


def _tensors(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def _uneven(num_experts, number):
    """Return coefficients without a pattern, which sum to one."""
    values = torch.rand(num_experts, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    return (values / values.sum()).tolist()


def _write_uneven(path, source):
    """Write other coefficients for each layer and matrix."""
    layers = {
        layer: {
            matrix: tuple(_uneven(source.config.num_experts, 10 * layer + at)) for at, matrix in enumerate(MATRICES)
        }
        for layer in source.config.moe_layers
    }
    has_shared = source.config.shared_expert_intermediate_size > 0
    shared = {layer: 0.1 + 0.07 * layer for layer in layers} if has_shared else None
    MergeCoefficients(layers, shared).save(path)
    return MergeSettings("coefficients", coefficients=path)


def _moved(source, tmp_path):
    """Return `source` with experts that are no copies any more."""
    folder = tmp_path / "moved"
    folder.mkdir()
    for path in source.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors, generator = _tensors(folder), torch.Generator().manual_seed(0)
    for name in tensors:
        if ".mlp." in name:
            tensors[name] += 0.05 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_moe(str(folder))


ROUND_TRIPS = {
    "tied": ("qwen2", {}, {}),
    "bfloat16": ("qwen2", {"dtype": torch.bfloat16}, {}),
    "float16": ("qwen3", {"dtype": torch.float16}, {"num_experts": 3}),
    "qwen3, sharded": ("qwen3", {"max_shard_size": "100KB"}, {}),
    "sliding": ("qwen2-sliding", {}, {}),
    "dense layers between": ("qwen1.5", {}, {"moe_layers": [1]}),
    "own head size": ("qwen2", {"head_dim": 8}, {}),
    "sigmoid": ("qwen2", {"dtype": torch.bfloat16}, {"shared_expert": "sigmoid"}),
    "plain": ("qwen3", {}, {"shared_expert": "plain"}),
    "complement": ("qwen2", {}, {"shared_expert": "complement"}),
    "slices": ("qwen2", {"dtype": torch.bfloat16}, {"experts": "split", "num_experts": 8, "expert_granularity": 4}),
    "slices beside a shared expert": ("qwen3", {}, {"experts": "split", "shared_expert": "plain"}),
    "free experts, biased": ("qwen2", {}, {"num_zero_experts": 1, "num_constant_experts": 1, "use_router_bias": True}),
}


@pytest.mark.parametrize("kind", ROUND_TRIPS)
@pytest.mark.parametrize("method", ["average", "coefficients"])
def test_copies_give_the_dense_checkpoint_to_the_bit(upcycled, tmp_path, kind, method):
    family, dense_fields, settings = ROUND_TRIPS[kind]
    dense, source = upcycled(family, dense_fields, **settings)
    asked = MergeSettings() if method == "average" else _write_uneven(tmp_path / "given.json", source)
    plan = _merged(source, tmp_path / "out", asked, max_shard_bytes=100_000 if "sharded" in kind else 10**9)
    expected, actual = _tensors(dense), _tensors(tmp_path / "out")
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert value.dtype == actual[name].dtype
        assert torch.equal(value.view(torch.uint8), actual[name].view(torch.uint8)), name
    parent, merged = (json.loads((folder / "config.json").read_text()) for folder in (dense, tmp_path / "out"))
    assert parent == merged
    assert (len(plan.derived.shards) > 2) == ("sharded" in kind)
    assert not list((tmp_path / "out").glob("*.py"))


def test_signs_of_zeros_and_subnormal_weights_survive(tmp_path):
    dense = write_dense(tmp_path / "dense", tokenizer=False)
    tensors = load_file(dense / "model.safetensors")
    down = tensors["model.layers.1.mlp.down_proj.weight"]
    down[0, 0], down[0, 1] = -0.0, 1e-44
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    convert(open_source(str(dense)), ConversionRecipe(num_experts=3, router="linear"), tmp_path / "moe")
    _merged(open_moe(str(tmp_path / "moe")), tmp_path / "out")
    merged = _tensors(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(merged.view(torch.int32), down.view(torch.int32))


def test_halved_outputs_in_float16_are_right_but_for_bits_that_halving_lost(upcycled, tmp_path):
    dense, source = upcycled("qwen2", {"dtype": torch.float16}, shared_expert="plain")
    _merged(source, tmp_path / "out")
    expected, actual = _tensors(dense), _tensors(tmp_path / "out")
    for name, value in expected.items():
        is_exact = value == actual[name]
        assert is_exact[value.abs() >= 2**-13].all()
        torch.testing.assert_close(value, actual[name], rtol=0, atol=2**-24)


def test_a_classifier_comes_back(tmp_path):
    config = AutoConfig.from_pretrained(write_dense(tmp_path / "base", tokenizer=False))
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    model = Qwen2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "dense")
    convert(open_source(str(tmp_path / "dense")), ConversionRecipe(num_experts=2, router="linear"), tmp_path / "moe")
    _merged(open_moe(str(tmp_path / "moe")), tmp_path / "out")
    merged = Qwen2ForSequenceClassification.from_pretrained(tmp_path / "out")
    assert merged.config.id2label == config.id2label
    for name, value in model.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value)


def test_what_comes_out_computes_the_same_and_converts_again(upcycled, tmp_path):
    dense, source = upcycled("qwen2")
    _merged(source, tmp_path / "out")
    report = verify(str(dense), str(tmp_path / "out"), num_sequences=1, sequence_length=16)
    assert report.equal
    assert report.max_difference == 0
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "Qwen2ForCausalLM"
    recipe = ConversionRecipe(num_experts=4, router="linear")
    convert(open_source(str(tmp_path / "out")), recipe, tmp_path / "again")
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (source.folder / weights).read_bytes()


def _naive_ffn(tensors, layer, coefficients, shared_weight, factors, num_slices):
    """Return the merged matrices of a layer, an element of the sum at a time."""
    prefix = f"model.layers.{layer}.mlp."
    gate_up, down = (tensors[f"{prefix}experts.{name}"].double() for name in ("gate_up_proj", "down_proj"))
    num_experts, width = len(gate_up), down.shape[2]
    num_copies = num_experts // num_slices
    found = {"gate_proj": [], "up_proj": [], "down_proj": []}
    for number in range(num_slices):
        for matrix, parts in found.items():
            chosen = coefficients[matrix][number * num_copies : (number + 1) * num_copies]
            part = 0
            for copy, coefficient in enumerate(chosen):
                expert = number * num_copies + copy
                weights = {
                    "gate_proj": gate_up[expert, :width],
                    "up_proj": gate_up[expert, width:],
                    "down_proj": down[expert] / num_slices / factors[0],
                }[matrix]
                part = part + coefficient / sum(chosen) * weights
            parts.append(part)
    merged = {name: torch.cat(parts, dim=1 if name == "down_proj" else 0) for name, parts in found.items()}
    if shared_weight is not None:
        for name in merged:
            shared = tensors[f"{prefix}shared_expert.{name}.weight"].double()
            shared = shared / factors[1] if name == "down_proj" else shared
            merged[name] = shared_weight * shared + (1 - shared_weight) * merged[name]
    return merged


MOVED = {
    "experts": ({}, (1.0, 1.0), 1),
    "sigmoid": ({"shared_expert": "sigmoid"}, (0.5, 1.0), 1),
    "slices and plain": (
        {"experts": "split", "num_experts": 6, "expert_granularity": 3, "shared_expert": "plain"},
        (0.5, 0.5),
        3,
    ),
}


@pytest.mark.parametrize("kind", MOVED)
def test_experts_of_their_own_are_averaged_as_the_formula_says(upcycled, tmp_path, monkeypatch, kind):
    """In the order of the experts, with coefficients of each layer and matrix, and over edges of blocks."""
    settings, factors, num_slices = MOVED[kind]
    source = _moved(upcycled("qwen2", **settings)[1], tmp_path)
    monkeypatch.setattr(contents, "BLOCK_ELEMENTS", 64 * 10)
    plan = _merged(source, tmp_path / "out", _write_uneven(tmp_path / "given.json", source))
    tensors, merged = _tensors(source.folder), _tensors(tmp_path / "out")
    for layer in source.config.moe_layers:
        shared_weight = plan.coefficients.shared[layer] if plan.coefficients.shared else None
        naive = _naive_ffn(tensors, layer, plan.coefficients.layers[layer], shared_weight, factors, num_slices)
        for name, expected in naive.items():
            actual = merged[f"model.layers.{layer}.mlp.{name}.weight"]
            torch.testing.assert_close(actual, expected.float(), rtol=1e-6, atol=1e-8)
            if kind == "experts":
                one_alone = tensors[f"model.layers.{layer}.mlp.experts.down_proj"][0]
                assert name != "down_proj" or not torch.allclose(actual, one_alone, atol=1e-3)


def test_the_average_counts_the_shared_expert_as_one_ffn(upcycled, tmp_path):
    _, source = upcycled("qwen3", experts="split", shared_expert="plain")
    coefficients = plan_merge(source, MergeSettings(), tmp_path / "out", 10**9).coefficients
    # Four slices are two FFNs.
    assert coefficients.shared == dict.fromkeys(range(3), 1 / 3)
    assert coefficients.layers[2]["up_proj"] == (0.25,) * 4


def test_the_shared_expert_alone_is_taken_as_it_is(upcycled, tmp_path):
    source = _moved(upcycled("qwen2", shared_expert="plain")[1], tmp_path)
    _merged(source, tmp_path / "out", MergeSettings("shared"))
    tensors, merged = _tensors(source.folder), _tensors(tmp_path / "out")
    for layer in range(3):
        for name in MATRICES:
            shared = tensors[f"model.layers.{layer}.mlp.shared_expert.{name}.weight"]
            factor = 2 if name == "down_proj" else 1
            assert torch.equal(merged[f"model.layers.{layer}.mlp.{name}.weight"], shared * factor)


def test_an_expert_that_counts_nothing_is_not_read(upcycled, tmp_path):
    """What is undefined in it does not reach the result."""
    source = _moved(upcycled("qwen2")[1], tmp_path)
    tensors = _tensors(source.folder)
    for name in tensors:
        if ".experts." in name:
            tensors[name][1] = torch.nan
    save_file(tensors, source.folder / "model.safetensors", metadata={"format": "pt"})
    MergeCoefficients.alike(dict.fromkeys(range(3), (0.0, 0.0, 1.0, 0.0))).save(tmp_path / "third.json")
    _merged(source, tmp_path / "out", MergeSettings("coefficients", coefficients=tmp_path / "third.json"))
    third = tensors["model.layers.0.mlp.experts.down_proj"][2]
    assert torch.equal(_tensors(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"], third)
    with pytest.raises(SettingsError, match=r"layers\.0\.mlp\.down_proj\.weight: the merged weights are not finite"):
        _merged(source, tmp_path / "other")
    assert not list(tmp_path.glob("other*"))


def test_saved_coefficients_give_the_same_bytes_again(upcycled, tmp_path):
    _, original = upcycled("qwen2", {}, experts="split", num_experts=6, expert_granularity=3, shared_expert="plain")
    source = _moved(original, tmp_path)
    given = _write_uneven(tmp_path / "given.json", source)
    saved = tmp_path / "saved.json"
    _merged(source, tmp_path / "first", given, save_coefficients=saved)
    _merged(source, tmp_path / "second", MergeSettings("coefficients", coefficients=saved))
    assert folder_hashes(tmp_path / "first") == folder_hashes(tmp_path / "second")
    assert saved.read_bytes() == (tmp_path / "given.json").read_bytes()


def test_the_provenance_gains_a_step(upcycled, tmp_path):
    _, source = upcycled("qwen2")
    plan = _merged(source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "upcycling.json").read_text())
    (step,) = written.pop("steps")
    assert written == source.provenance
    assert (step["command"], step["method"]) == ("merge", "average")
    assert step["source"] == {"name": source.name, "revision": None}
    assert step["coefficients"] == plan.coefficients.to_dict()
    assert (tmp_path / "out" / "README.md").is_file()
    assert plan.derived.total_parameters == sum(
        parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters()
    )


class Warnings(Progress):
    def __init__(self):
        self.messages = []

    def warn(self, message):
        self.messages.append(message)


WARNED = {
    "free": ({"num_zero_experts": 1, "num_copy_experts": 2}, "its 3 experts without computation have no place"),
    "random": ({"experts": "random", "num_experts": 2}, "its experts started at random"),
}


@pytest.mark.parametrize("kind", WARNED)
def test_what_an_average_leaves_out_or_means_little_for_is_told(upcycled, tmp_path, kind):
    settings, part = WARNED[kind]
    _, source = upcycled("qwen2", shared_expert="plain", **settings)
    one_alone = (1.0,) + (0.0,) * (source.config.num_experts - 1)
    two = (0.5, 0.5) + (0.0,) * (source.config.num_experts - 2)
    MergeCoefficients.alike({0: one_alone, 1: one_alone, 2: two}, {0: 0.5, 1: 0.5, 2: 1.0}).save(tmp_path / "one.json")
    MergeCoefficients.alike({0: one_alone, 1: two, 2: one_alone}, {0: 0.5, 1: 0.5, 2: 1.0}).save(tmp_path / "two.json")

    def warnings(merge_settings):
        progress = Warnings()
        plan_merge(source, merge_settings, tmp_path / "out", 10**9, progress=progress)
        return progress.messages

    for asked in (MergeSettings(), MergeSettings("coefficients", coefficients=tmp_path / "two.json")):
        (message,) = warnings(asked)
        assert part in message
    for asked in (MergeSettings("shared"), MergeSettings("coefficients", coefficients=tmp_path / "one.json")):
        assert warnings(asked) == []


def test_an_interrupted_merge_leaves_nothing_and_a_killed_one_stands_in_no_way(upcycled, tmp_path, monkeypatch):
    def interrupt(*folders):
        raise KeyboardInterrupt

    _, source = upcycled("qwen2")
    out, saved = tmp_path / "out", tmp_path / "saved.json"
    with monkeypatch.context() as patched:
        patched.setattr(merge_module, "write_card", interrupt)
        with pytest.raises(KeyboardInterrupt):
            _merged(source, out, save_coefficients=saved)
    assert list(tmp_path.iterdir()) == []
    leave_partial(tmp_path)
    _merged(source, out, save_coefficients=saved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "saved.json"]


def test_a_checkpoint_that_is_in_the_way_stays(upcycled, tmp_path):
    _, source = upcycled("qwen2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match="exists and is not empty"):
        plan_merge(source, MergeSettings(), tmp_path / "out", 10**9)
    coefficients = tmp_path / "out" / "given.json"
    settings = _write_uneven(coefficients, source)
    with pytest.raises(SettingsError, match=r"given\.json, which replacing it would delete"):
        plan_merge(source, settings, tmp_path / "out", 10**9, overwrite=True)
    assert coefficients.exists()


def test_a_checkpoint_without_provenance_merges_if_nothing_was_multiplied(tmp_path):
    plain = open_moe(str(write_checkpoint(tmp_path / "plain", "linear")))
    _merged(plain, tmp_path / "out")
    tensors = _tensors(plain.folder)
    mean = tensors["model.layers.1.mlp.experts.down_proj"].double().mean(dim=0).float()
    torch.testing.assert_close(_tensors(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"], mean)
