"""What becomes of all that is not a routed expert or a router."""

import typing

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from upcycled_moe.common.streaming import contents
from upcycled_moe.conversion.backbone import BACKBONES, backbone_method
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.source import open_source


def weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def backbone_of(tensors):
    """Return those tensors of a MoE checkpoint that are neither routed experts nor routers."""
    return {name: tensor for name, tensor in tensors.items() if ".experts." not in name and ".gate." not in name}


def dense_name(name):
    return name.replace("shared_expert.", "")


def test_every_way_in_the_recipe_is_there():
    assert {"auto", *BACKBONES} == set(typing.get_args(ConversionRecipe.__annotations__["backbone"]))


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({}, "copy"),
        ({"backbone": "random"}, "random"),
        ({"expert_sources": ["other"]}, "average"),
        ({"expert_sources": ["other"], "backbone": "copy"}, "copy"),
    ],
)
def test_auto_averages_only_where_there_are_several(linear_recipe, settings, method):
    assert backbone_method(linear_recipe(**settings)) == method


@pytest.mark.parametrize("block_elements", [100, 5000, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backbone_is_the_mean_of_all_models(dense, linear_recipe, tmp_path, monkeypatch, dtype, block_elements):
    monkeypatch.setattr(contents, "BLOCK_ELEMENTS", block_elements)
    folders = [dense("qwen3", dtype=dtype, seed=seed) for seed in range(4)]
    recipe = linear_recipe(
        expert_sources=[str(folder) for folder in folders[1:]], moe_layers=[0, 2], shared_expert="sigmoid"
    )
    convert(open_source(str(folders[0])), recipe, tmp_path / "out")
    parents, child = [weights(folder) for folder in folders], weights(tmp_path / "out")
    gates = {f"model.layers.{layer}.mlp.shared_expert_gate.weight" for layer in (0, 2)}
    averaged = {name: tensor for name, tensor in backbone_of(child).items() if name not in gates}
    # Four numbers add up and halve exactly enough for one right answer in the type of the file.
    for name, tensor in averaged.items():
        expected = sum(parent[dense_name(name)].double() for parent in parents) / 4
        assert tensor.dtype == dtype
        assert torch.allclose(tensor.double(), expected.to(dtype).double(), rtol=1e-6, atol=1e-7), name
    # Embedding, norms, attention, the FFN of layer 1 and, as shared experts, those of the others.
    assert {dense_name(name) for name in averaged} == set(parents[0])
    for layer in (0, 2):
        for expert, parent in enumerate(parents):
            mlp = f"model.layers.{layer}.mlp."
            gate_up = torch.cat([parent[f"{mlp}gate_proj.weight"], parent[f"{mlp}up_proj.weight"]])
            assert torch.equal(child[f"{mlp}experts.gate_up_proj"][expert], gate_up)
            # Beside a shared expert each routed one weighs half.
            assert torch.equal(child[f"{mlp}experts.down_proj"][expert] * 2, parent[f"{mlp}down_proj.weight"])


def test_experts_of_several_models_may_share_the_first_ones_backbone(dense, linear_recipe, tmp_path):
    folders = [dense(seed=seed) for seed in range(2)]
    recipe = linear_recipe(expert_sources=[str(folders[1])], backbone="copy")
    convert(open_source(str(folders[0])), recipe, tmp_path / "out")
    first, child = weights(folders[0]), weights(tmp_path / "out")
    assert all(torch.equal(tensor, first[name]) for name, tensor in backbone_of(child).items())


@pytest.mark.parametrize("family", ["qwen2", "qwen1.5", "qwen3"])
def test_a_random_backbone_is_that_of_a_fresh_model(dense, linear_recipe, tmp_path, family):
    recipe = linear_recipe(backbone="random", experts="random", mlp_only_layers=[1], shared_expert="plain")
    convert(open_source(str(dense(family))), recipe, tmp_path / "out")
    parent, child = weights(dense(family)), weights(tmp_path / "out")
    for name, tensor in child.items():
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif name.endswith(".bias"):
            assert torch.equal(tensor, torch.zeros_like(tensor)), name
        else:
            assert tensor.std().item() == pytest.approx(0.1, rel=0.15), name
            assert abs(tensor.mean().item()) < 5 * 0.1 / tensor.numel() ** 0.5, name
    assert {dense_name(name) for name in backbone_of(child)} == set(parent)
    # All are drawn apart.
    drawn = [tensor.flatten()[:200] for tensor in child.values() if tensor.std() > 0.05]
    assert len({tuple(tensor.tolist()) for tensor in drawn}) == len(drawn)


@pytest.mark.parametrize("settings", [{"backbone": "random"}, {"expert_sources": ["other"]}])
def test_a_stored_copy_of_tied_embeddings_does_not_go_its_own_way(dense, linear_recipe, tmp_path, settings):
    """A loader may take the head that is stored: it must be the embedding, or not be there."""
    folders = []
    for seed in range(2):
        folder = tmp_path / f"dense-{seed}"
        folder.mkdir()
        for path in dense(seed=seed).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        folders.append(folder)
    if "expert_sources" in settings:
        settings = {"expert_sources": [str(folders[1])]}
    convert(open_source(str(folders[0])), linear_recipe(**settings), tmp_path / "out")
    assert "lm_head.weight" not in weights(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    # A copy stays a copy, head included.
    convert(open_source(str(folders[0])), linear_recipe(), tmp_path / "copy")
    assert "lm_head.weight" in weights(tmp_path / "copy")
