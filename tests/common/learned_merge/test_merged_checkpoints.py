"""Whole checkpoints merged into one: streamed, to the bit where that can be, and only where they belong together."""

import json
import shutil

import pytest
import torch
from dense_checkpoints import folder_hashes
from moe_checkpoints import make_model, write_checkpoint
from safetensors.torch import load_file, save_file

from upcycled_moe.common.checkpoints import load_config, load_model, load_tokenizer
from upcycled_moe.common.learned_merge.checkpoints import check_merged, open_checkpoints, write_merged
from upcycled_moe.common.learned_merge.merge import LearnedMerge
from upcycled_moe.common.output_folder import OutputError
from upcycled_moe.common.provenance import read_provenance
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.model_cards.card import write_card


def _weights(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def _naive(folders, coefficients):
    """Return Σ_k c_k S_k in float64, all at once."""
    weights = [_weights(folder) for folder in folders]
    return {
        name: sum(c * each[name].double() for c, each in zip(coefficients, weights, strict=True)).to(value.dtype)
        for name, value in weights[0].items()
    }


def _open(*folders):
    return open_checkpoints([str(folder) for folder in folders])


@pytest.fixture(scope="module")
def dense_pair(dense):
    return [dense("qwen2", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def moe_pair(tmp_path_factory):
    """Two MoE checkpoints with biases of their routers, which are buffers."""
    folders = [tmp_path_factory.mktemp("moe") for _ in range(2)]
    for seed, folder in enumerate(folders):
        write_checkpoint(folder, "linear", seed=seed, use_router_bias=True)
        weights = load_file(folder / "model.safetensors")
        biases = [name for name in weights if name.endswith("e_score_correction_bias")]
        assert biases
        for name in biases:
            weights[name] = torch.randn(4)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folders


@pytest.mark.parametrize("pair", ["dense_pair", "moe_pair"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000])
def test_a_merge_is_the_weighted_sum_of_all_tensors(pair, max_shard_bytes, request, tmp_path):
    folders = request.getfixturevalue(pair)
    write_merged(_open(*folders), {"model": [0.3, 0.7]}, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    written, expected = _weights(tmp_path / "out"), _naive(folders, [0.3, 0.7])
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(written[name], value), name


def test_layers_have_coefficients_of_their_own(dense_pair, tmp_path):
    shares = {"layer 0": 0.1, "layer 1": 0.2, "layer 2": 0.6, "rest": 0.9}
    write_merged(_open(*dense_pair), {name: [share, 1 - share] for name, share in shares.items()}, tmp_path / "out")
    written = _weights(tmp_path / "out")
    expected = {name: _naive(dense_pair, [share, 1 - share]) for name, share in shares.items()}
    for name, value in written.items():
        group = f"layer {name.split('.')[2]}" if ".layers." in name else "rest"
        assert torch.equal(value, expected[group][name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coefficients", [[1 / 3, 1 / 3, 1 / 3], [0.1, 0.2, 0.7], [0.333333, 0.333333, 0.3333333]])
def test_equal_checkpoints_give_the_same_to_the_bit(dense, dtype, coefficients, tmp_path):
    folder = dense("qwen3", dtype=dtype)
    write_merged(_open(folder, folder, folder), {"model": coefficients}, tmp_path / "out")
    written = _weights(tmp_path / "out")
    for name, value in _weights(folder).items():
        assert torch.equal(written[name], value)


def test_a_coefficient_of_one_gives_that_checkpoint_to_the_bit(dense_pair, tmp_path):
    # What counts nothing is not read: it may be infinite.
    broken = shutil.copytree(dense_pair[0], tmp_path / "broken")
    save_file(
        {name: value * torch.inf for name, value in _weights(broken).items()},
        broken / "model.safetensors",
        {"format": "pt"},
    )
    write_merged(_open(broken, dense_pair[1]), {"model": [0.0, 1.0]}, tmp_path / "out")
    written = _weights(tmp_path / "out")
    for name, value in _weights(dense_pair[1]).items():
        assert torch.equal(written[name], value)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_result_is_as_precise_as_the_most_precise(dense, order, tmp_path):
    folders = [(dense("qwen2", dtype=torch.bfloat16), dense("qwen2", seed=1))[index] for index in order]
    write_merged(_open(*folders), {"model": [0.5, 0.5]}, tmp_path / "out")
    weights = [_weights(folder) for folder in folders]
    for name, value in _weights(tmp_path / "out").items():
        assert value.dtype == torch.float32
        assert torch.equal(value, (weights[0][name].double() / 2 + weights[1][name].double() / 2).float())
    config = load_config(str(tmp_path / "out"))
    assert load_model(str(tmp_path / "out"), config, dtype="auto", device="cpu").dtype == torch.float32


@pytest.mark.parametrize("pair", ["dense_pair", "moe_pair"])
def test_the_result_says_where_it_comes_from_and_loads(pair, request, tmp_path, make_tokens):
    first, second = request.getfixturevalue(pair)
    out = tmp_path / "out"
    write_merged(_open(first, second), {"model": [0.25, 0.75]}, out, finish=write_card, method="coefficients")
    [step] = read_provenance(out)["steps"]
    assert (step["command"], step["method"]) == ("merge", "coefficients")
    assert step["source"]["name"] == str(first)
    assert [source["name"] for source in step["other_sources"]] == [str(second)]
    assert step["coefficients"] == {"model": [0.25, 0.75]}
    assert "merge" in (out / "README.md").read_text(encoding="utf-8")
    assert load_tokenizer(str(out)).get_vocab() == load_tokenizer(str(first)).get_vocab()
    model = load_model(str(out), load_config(str(out)), dtype="auto", device="cpu")
    assert step["total_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert torch.isfinite(model(make_tokens()).logits).all()


@pytest.mark.parametrize("pair", ["dense_pair", "moe_pair"])
@pytest.mark.parametrize("per", ["model", "layer"])
def test_what_is_learned_is_what_is_written(pair, per, request, tmp_path, make_tokens):
    folders = request.getfixturevalue(pair)
    series = _open(*folders)
    config = series.sources[0].config
    model = load_model(str(folders[0]), config, dtype=torch.float32, device="cpu", own_code=False)
    merge = LearnedMerge(model, series.groups([1, 2], per))
    assert list(merge.values()) == series.group_names(per)
    optimizer = merge.attached(torch.optim.Adam(merge.parameters(), lr=0.5))
    tokens = make_tokens()
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    coefficients = merge.values()
    assert all(abs(values[0] - 1 / 3) > 0.05 for values in coefficients.values())
    write_merged(series, coefficients, tmp_path / "out")
    learned = model.state_dict()
    for name, value in _weights(tmp_path / "out").items():
        torch.testing.assert_close(learned[name], value, rtol=1e-6, atol=1e-7)


def test_weights_that_are_not_finite_leave_nothing(dense_pair, tmp_path):
    broken = shutil.copytree(dense_pair[0], tmp_path / "broken")
    weights = _weights(broken)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingsError, match=r"model.layers.1.mlp.up_proj.weight: the merged weights are not finite"):
        write_merged(_open(dense_pair[1], broken), {"model": [0.5, 0.5]}, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_folder_that_is_there_is_replaced_with_leave_only(dense_pair, tmp_path):
    series, out = _open(*dense_pair), tmp_path / "out"
    write_merged(series, {"model": [0.5, 0.5]}, out)
    before = folder_hashes(out)
    with pytest.raises(OutputError, match="--overwrite"):
        write_merged(series, {"model": [0.1, 0.9]}, out)
    assert folder_hashes(out) == before
    write_merged(series, {"model": [0.1, 0.9]}, out, overwrite=True)
    assert folder_hashes(out) != before


def test_no_source_is_written_over(dense_pair):
    with pytest.raises(OutputError, match="itself"):
        check_merged(_open(*dense_pair), dense_pair[1], overwrite=True)


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ({"model": [0.5, 0.6]}, "coefficients of model: .* no shares from 0 to 1 that sum to one"),
        ({"model": [1.5, -0.5]}, "no shares from 0 to 1"),
        ({"model": [float("nan"), 1.0]}, "no shares from 0 to 1"),
        ({"model": [1.0]}, "1 numbers for 2 checkpoints"),
        ({"layer 0": [0.5, 0.5]}, "give them for 'model', or for each of rest, layer 0, layer 1, layer 2"),
        ({}, "coefficients are of nothing"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(dense_pair, coefficients, message):
    with pytest.raises(SettingsError, match=message):
        _open(*dense_pair).derived(coefficients)


def test_groups_need_a_share_for_each_checkpoint_and_a_known_scope(dense_pair):
    with pytest.raises(SettingsError, match="3 numbers for 2 checkpoints"):
        _open(*dense_pair).groups([1, 1, 1])
    with pytest.raises(SettingsError, match="per='matrix': choose one of model, layer"):
        _open(*dense_pair).groups([1, 1], "matrix")


def _with_config(folder, out, **fields):
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    (out / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")
    return out


def test_checkpoints_of_one_architecture_only(dense_pair, moe_pair, dense, tmp_path):
    with pytest.raises(SettingsError, match="give two checkpoints or more"):
        _open(dense_pair[0])
    with pytest.raises(SettingsError, match="only checkpoints of one architecture"):
        _open(dense_pair[0], moe_pair[0])
    other = _with_config(dense_pair[1], tmp_path / "other", rms_norm_eps=1e-3)
    with pytest.raises(SettingsError, match=r"other: rms_norm_eps=0.001 in config.json, and 1e-06 in"):
        _open(dense_pair[0], other)
    mixtral = write_checkpoint(tmp_path / "mixtral", "mixtral")
    with pytest.raises(SettingsError, match="model_type 'mixtral' cannot be merged; allowed: 'qwen2', 'qwen3'"):
        _open(dense_pair[0], mixtral)
    weights = _weights(dense_pair[1])
    lacking = shutil.copytree(dense_pair[1], tmp_path / "lacking")
    save_file({name: weights[name] for name in list(weights)[1:]}, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(SettingsError, match="is missing"):
        _open(dense_pair[0], lacking)


def test_what_only_training_reads_may_differ(dense_pair, moe_pair, tmp_path):
    tuned = _with_config(dense_pair[1], tmp_path / "tuned", pad_token_id=3, use_cache=False)
    assert len(_open(dense_pair[0], tuned).sources) == 2
    tuned = _with_config(moe_pair[1], tmp_path / "moe", router_aux_loss_coef=0.5, output_router_logits=True)
    assert len(_open(moe_pair[0], tuned).sources) == 2


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_converted_model_merges_with_a_trained_one_whose_routers_are_in_float32(moe_pair, order, tmp_path):
    folders = [moe_pair[0], _with_config(moe_pair[1], tmp_path / "trained", router_dtype="float32")]
    write_merged(_open(*(folders[index] for index in order)), {"model": [0.5, 0.5]}, tmp_path / "out")
    assert load_config(str(moe_pair[0])).router_dtype is None
    assert load_config(str(tmp_path / "out")).router_dtype == "float32"


def test_a_classifier_is_merged_with_its_head_and_by_one_padding_token(tmp_path):
    folders = [tmp_path / str(seed) for seed in range(2)]
    for seed, folder in enumerate(folders):
        make_model("classifier", seed, num_labels=1).save_pretrained(folder)
    write_merged(_open(*folders), {"model": [0.5, 0.5]}, tmp_path / "out")
    scores = [_weights(folder)["score.weight"] for folder in folders]
    torch.testing.assert_close(_weights(tmp_path / "out")["score.weight"], (scores[0] + scores[1]) / 2)
    other = _with_config(folders[1], tmp_path / "other", pad_token_id=3)
    with pytest.raises(SettingsError, match="pad_token_id=3"):
        _open(folders[0], other)
