"""Whole checkpoints merged into one: streamed, to the bit where that is possible, and only where they belong together."""

import json

import pytest
import torch
from moe_checkpoints import write_checkpoint
from safetensors.torch import load_file

from upcycled_moe.common.checkpoints import load_config, load_model
from upcycled_moe.common.learned_merge.checkpoints import open_checkpoints, write_merged
from upcycled_moe.common.learned_merge.merge import LearnedMerge
from upcycled_moe.common.output_folder import OutputError
from upcycled_moe.common.provenance import read_provenance
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.model_cards.card import write_card


def _weights(folder):
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def _naive(folders, coefficients):
    """Σ_k c_k S_k in float64, all at once."""
    first, *others = [_weights(folder) for folder in folders]
    return {
        name: sum(c * weights[name].double() for c, weights in zip(coefficients, (first, *others), strict=True)).to(
            first[name].dtype
        )
        for name in first
    }


@pytest.fixture(scope="module")
def dense_pair(dense):
    return [dense("qwen2", seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def moe_pair(tmp_path_factory):
    """Two MoE checkpoints with biases of their routers, which are buffers."""
    folder = tmp_path_factory.mktemp("moes")
    return [write_checkpoint(folder / str(seed), "linear", seed=seed, use_router_bias=True) for seed in (0, 1)]


@pytest.mark.parametrize("pair", ["dense_pair", "moe_pair"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 40_000])
def test_a_merge_is_the_weighted_sum_of_all_tensors(pair, max_shard_bytes, request, tmp_path):
    folders = request.getfixturevalue(pair)
    series = open_checkpoints([str(folder) for folder in folders])
    coefficients = {"model": [0.3, 0.7]}
    write_merged(series, coefficients, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    written, expected = _weights(tmp_path / "out"), _naive(folders, [0.3, 0.7])
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(written[name], value), name


def test_layers_have_coefficients_of_their_own(dense_pair, tmp_path):
    series = open_checkpoints([str(folder) for folder in dense_pair])
    shares = {"layer 0": 0.1, "layer 1": 0.2, "layer 2": 0.6, "rest": 0.9}
    write_merged(series, {name: [share, 1 - share] for name, share in shares.items()}, tmp_path / "out")
    written = _weights(tmp_path / "out")
    for name in written:
        group = f"layer {name.split('.')[2]}" if ".layers." in name else "rest"
        expected = _naive(dense_pair, [shares[group], 1 - shares[group]])[name]
        assert torch.equal(written[name], expected), name
