"""The similarity of expert weights and their distance from a parent, against whole vectors in double precision."""

import itertools
import shutil
from types import SimpleNamespace

import pytest
import torch
from dense_checkpoints import write_dense
from moe_checkpoints import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from upcycled_moe.analysis.measures import Subject, expert_weights
from upcycled_moe.analysis.measures.expert_weights import ExpertWeights
from upcycled_moe.analysis.parent import DenseParent
from upcycled_moe.common.moe_layers import find_moe_layers
from upcycled_moe.common.settings import SettingsError


NUM_EXPERTS = 4


def _result(layers, parent=None):
    return ExpertWeights(Subject(layers, ["text"], torch.device("cpu"), parent=parent)).result()


def _vectors(layer):
    """All weights of each expert as one vector."""
    weights = (layer.experts.gate_up_proj, layer.experts.down_proj)
    return torch.cat([weight.detach().double().flatten(1) for weight in weights], dim=1)


def _cosine(first, second):
    return torch.cosine_similarity(first, second, dim=0).item()


def _mean_cosine(vectors):
    pairs = list(itertools.combinations(vectors, 2))
    return sum(_cosine(*pair) for pair in pairs) / len(pairs)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A dense checkpoint, and the model."""
    folder = tmp_path_factory.mktemp("parent") / "dense"
    write_dense(folder)
    return str(folder), AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def upcycled(parent):
    """`upcycled(scale, dtype)`: MoE layers with copies of the parent's networks, moved by random amounts."""

    def make(scale=0.0, dtype=torch.float32):
        shape = {"hidden_size": 64, "moe_intermediate_size": 96}
        layers = find_moe_layers(make_model("linear", **shape).to(dtype))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer, dense in zip(layers, parent[1].model.layers, strict=True):
                gate_up = torch.cat([dense.mlp.gate_proj.weight, dense.mlp.up_proj.weight])
                for fused, weight in (
                    (layer.experts.gate_up_proj, gate_up),
                    (layer.experts.down_proj, dense.mlp.down_proj.weight),
                ):
                    fused.copy_(weight + scale * torch.randn(fused.shape, generator=generator))
        return layers

    return make


def test_two_experts_by_hand():
    """H = I = 1: the experts (gate, up, down) are (1, 2, 2) and (2, 1, -2): cosine 0 of 9; by matrix 1, 1 and -1."""
    experts = SimpleNamespace(
        gate_up_proj=torch.tensor([[[1.0], [2.0]], [[2.0], [1.0]]]), down_proj=torch.tensor([[[2.0]], [[-2.0]]])
    )

    result = _result([SimpleNamespace(index=0, experts=experts)])

    assert result.per_layer["expert_weight_similarity"] == [pytest.approx(0.0)]
    assert result.tables["similarity"] == [[[1.0, 0.0], [0.0, 1.0]]]
    assert result.tables["similarity_of_matrices"] == {"gate": [1.0], "up": [1.0], "down": [-1.0]}


@pytest.mark.parametrize("kind", ["linear", "mixture", "zero experts", "mixtral", "qwen3_moe"])
def test_matrices_count_as_one_vector(kind, monkeypatch):
    # Rows in several chunks, the last of them shorter.
    monkeypatch.setattr(expert_weights, "CHUNK_WEIGHTS", NUM_EXPERTS * 32 * 5)
    layers = find_moe_layers(make_model(kind))

    result = _result(layers)

    for at, layer in enumerate(layers):
        vectors = _vectors(layer)
        assert result.per_layer["expert_weight_similarity"][at] == pytest.approx(_mean_cosine(vectors), abs=1e-9)
        for first, second in itertools.product(range(NUM_EXPERTS), repeat=2):
            expected = _cosine(vectors[first], vectors[second])
            assert result.tables["similarity"][at][first][second] == pytest.approx(expected, abs=1e-9)
        up = layer.experts.gate_up_proj.detach().double().chunk(2, dim=1)[1].flatten(1)
        assert result.tables["similarity_of_matrices"]["up"][at] == pytest.approx(_mean_cosine(up), abs=1e-9)


def test_without_a_parent_the_figures_against_it_are_null():
    result = _result(find_moe_layers(make_model("linear")))

    assert result.per_layer["parent_divergence"] == result.per_layer["parent_update_similarity"] == [None] * 3
    assert "No dense parent" in result.notes[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copies_have_not_moved(upcycled, parent, dtype):
    result = _result(upcycled(dtype=dtype), parent[0])

    assert result.per_layer["expert_weight_similarity"] == pytest.approx([1.0] * 3, abs=1e-12)
    assert result.per_layer["parent_divergence"] == [0.0] * 3
    # No direction without a movement.
    assert result.per_layer["parent_update_similarity"] == [None] * 3
    assert result.notes == []


def test_moved_experts_are_compared_with_their_parent(upcycled, parent, monkeypatch):
    monkeypatch.setattr(expert_weights, "CHUNK_WEIGHTS", NUM_EXPERTS * 64 * 7)
    layers = upcycled(scale=0.01)
    with torch.no_grad():
        layers[1].experts.gate_up_proj[2] += 0.02

    result = _result(layers, parent[0])

    for at, (layer, dense) in enumerate(zip(layers, parent[1].model.layers, strict=True)):
        mlp = dense.mlp
        matrices = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        origin = torch.cat([matrix.weight.detach().double().flatten() for matrix in matrices])
        updates = _vectors(layer) - origin
        divergence = (updates.norm(dim=1) / origin.norm()).tolist()
        assert result.tables["divergence"][at] == pytest.approx(divergence, rel=1e-9)
        assert result.per_layer["parent_divergence"][at] == pytest.approx(sum(divergence) / 4, rel=1e-9)
        assert result.per_layer["parent_update_similarity"][at] == pytest.approx(_mean_cosine(updates), abs=1e-9)
        expected = _cosine(updates[0], updates[2])
        assert result.tables["update_similarity"][at][0][2] == pytest.approx(expected, abs=1e-9)
    # Random movements have nothing in common, though the experts are nearly the same.
    assert abs(result.per_layer["parent_update_similarity"][0]) < 0.02
    assert result.per_layer["expert_weight_similarity"][0] > 0.98


def test_an_expert_that_stayed_is_left_out_of_the_directions(upcycled, parent):
    layers = upcycled(scale=0.01)
    copies = upcycled()
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(layers[0].experts, name)[3] = getattr(copies[0].experts, name)[3]

    result = _result(layers, parent[0])

    assert result.tables["divergence"][0][3] == 0.0
    assert result.tables["update_similarity"][0][3] == [None] * 4
    assert result.per_layer["parent_update_similarity"][0] is not None


def test_experts_of_another_shape_are_not_compared(parent):
    layers = find_moe_layers(make_model("linear", hidden_size=64, moe_intermediate_size=48))

    result = _result(layers, parent[0])

    assert result.per_layer["parent_divergence"] == [None] * 3
    assert result.per_layer["expert_weight_similarity"][0] is not None
    assert "shape" in result.notes[0]


def test_a_parent_of_zeros_has_no_norm_to_divide_by(upcycled, parent, tmp_path):
    folder = shutil.copytree(parent[0], tmp_path / "zeros")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")

    result = _result(upcycled(), str(folder))

    assert result.per_layer["parent_divergence"] == [None] * 3
    assert result.tables["divergence"] == [[None] * NUM_EXPERTS] * 3
    assert "zero" in result.notes[0]


def test_a_parent_that_breaks_while_it_is_read_is_noted(upcycled, parent, monkeypatch):
    def fail(*_):
        raise SettingsError("model.safetensors: cannot be read")

    monkeypatch.setattr(DenseParent, "feed_forward", fail)

    result = _result(upcycled(), parent[0])

    assert result.per_layer["parent_divergence"] == [None] * 3
    assert result.per_layer["expert_weight_similarity"] == pytest.approx([1.0] * 3)
    assert "cannot be read" in result.notes[0]


def test_a_parent_that_cannot_be_read_is_noted(tmp_path):
    result = _result(find_moe_layers(make_model("linear")), str(tmp_path))

    assert result.per_layer["parent_divergence"] == [None] * 3
    assert str(tmp_path) in result.notes[0]


def test_a_single_expert_has_no_pairs(upcycled, parent):
    [layer, *_] = upcycled(scale=0.01)
    experts = SimpleNamespace(gate_up_proj=layer.experts.gate_up_proj[:1], down_proj=layer.experts.down_proj[:1])

    result = _result([SimpleNamespace(index=0, experts=experts)], parent[0])

    assert result.per_layer["expert_weight_similarity"] == result.per_layer["parent_update_similarity"] == [None]
    assert result.per_layer["parent_divergence"][0] > 0
