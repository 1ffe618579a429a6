import json
import shutil

import pytest
import torch
from dense_checkpoints import write_dense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.source import open_source
from upcycled_moe.conversion.verify import verify


@pytest.fixture(scope="module")
def pair(dense, linear_recipe, tmp_path_factory):
    """A dense checkpoint and its conversion."""
    out = tmp_path_factory.mktemp("moe") / "out"
    convert(open_source(str(dense("qwen3"))), linear_recipe(), out)
    return str(dense("qwen3")), out


@pytest.fixture
def spoiled(pair, tmp_path):
    """The pair with a copy of the conversion that a test may spoil."""
    return pair[0], shutil.copytree(pair[1], tmp_path / "spoiled")


def test_a_conversion_equals_its_parent(pair):
    dense, moe = pair
    report = verify(dense, str(moe), num_sequences=2, sequence_length=20)
    assert report.equal
    assert report.max_difference <= 5e-6
    assert report.argmax_agreement == 1.0
    assert report.num_positions == 40
    assert report.tolerance == pytest.approx(5e-6 * max(1.0, report.max_logit))
    assert report.to_dict()["equal"] is True


def test_the_same_seed_gives_the_same_report(pair):
    dense, moe = pair
    reports = [verify(dense, str(moe), num_sequences=1, sequence_length=8, seed=seed) for seed in (0, 0, 1)]
    assert reports[0] == reports[1]
    assert reports[0].max_logit != reports[2].max_logit


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.experts.down_proj", "model.layers.0.self_attn.q_norm.weight"])
def test_one_changed_weight_is_found(spoiled, tensor):
    dense, moe = spoiled
    tensors = load_file(moe / "model.safetensors")
    tensors[tensor] = tensors[tensor].clone()
    tensors[tensor].flatten()[5] += 0.5
    save_file(tensors, moe / "model.safetensors", metadata={"format": "pt"})
    report = verify(dense, str(moe))
    assert not report.equal
    assert report.max_difference > report.tolerance


def write_outliers(folder, channel=7):
    """Write a dense model whose residual has one channel in the thousands, which its norms make up for.

    Real Qwens have such channels. Its attention is sharp, so that rounding decides now and then what is attended to.
    """
    write_dense(folder, num_hidden_layers=6, hidden_size=128, intermediate_size=256)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(320, (4, 128), generator=torch.Generator().manual_seed(9))
    seen = []
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[channel] *= 1000
        layers = model.model.layers[1:]
        norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        for norm in (*norms, model.model.norm):
            hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            model(tokens)
            hook.remove()
            squares = seen[-1].square()
            others = (squares.sum(-1) - squares[..., channel]) / (squares.shape[-1] - 1)
            norm.weight *= 3 * (squares.mean(-1) / others).sqrt().mean()
            norm.weight[channel] = 0
    assert seen[-1][..., channel].abs().max() > 2000
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def outliers(linear_recipe, tmp_path_factory):
    """A dense checkpoint with an outlier channel, and its conversion."""
    folder = tmp_path_factory.mktemp("outliers")
    dense = write_outliers(folder / "dense")
    convert(open_source(str(dense)), linear_recipe(), folder / "moe")
    return str(dense), folder / "moe"


@pytest.mark.parametrize("seed", range(3))
def test_rounding_that_a_model_amplifies_is_no_difference(outliers, seed):
    report = verify(outliers[0], str(outliers[1]), seed=seed)
    assert report.equal
    # Without the allowance it were one.
    assert report.max_difference > 3 * report.tolerance
    assert report.rounding_noise > report.tolerance
    assert report.is_limited_by_rounding
    assert report.max_allowed == pytest.approx(20 * report.rounding_noise)


def change_an_expert_matrix(tensors):
    tensors["model.layers.1.mlp.experts.down_proj"][2] *= 1.01


def swap_layers(tensors):
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        other = name.replace("layers.1.", "layers.2.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


@pytest.mark.parametrize("change", [change_an_expert_matrix, swap_layers])
@pytest.mark.parametrize("kind", ["pair", "outliers"])
def test_a_wrong_conversion_is_a_difference(request, tmp_path, kind, change):
    dense, moe = request.getfixturevalue(kind)
    moe = shutil.copytree(moe, tmp_path / "spoiled")
    tensors = {name: tensor.clone() for name, tensor in load_file(moe / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, moe / "model.safetensors", metadata={"format": "pt"})
    report = verify(dense, str(moe))
    assert not report.equal
    assert report.difference_to_allowed > 10


def test_code_of_another_repository_needs_leave(spoiled):
    dense, moe = spoiled
    config = json.loads((moe / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {name: f"org/other--{code}" for name, code in config["auto_map"].items()}
    (moe / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(SettingsError, match=r"names code of another repository \(org/other--configuration"):
        verify(dense, str(moe))
    # With leave it is asked for, and nobody answers here.
    with pytest.raises(SettingsError, match="cannot be loaded"):
        verify(dense, str(moe), trust_remote_code=True)


def test_a_result_that_is_no_number_is_a_difference(spoiled):
    dense, moe = spoiled
    tensors = load_file(moe / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, moe / "model.safetensors", metadata={"format": "pt"})
    assert not verify(dense, str(moe), num_sequences=1, sequence_length=4).equal


def test_the_tolerance_can_be_given(pair):
    dense, moe = pair
    assert not verify(dense, str(moe), num_sequences=1, sequence_length=8, tolerance=0.0).equal
    assert verify(dense, str(moe), num_sequences=1, sequence_length=8, dtype=torch.bfloat16, tolerance=1.0).equal


def test_the_checkpoints_own_code_is_what_runs(spoiled):
    dense, moe = spoiled
    path = moe / "modeling_upcycled_moe.py"
    code = path.read_text(encoding="utf-8")
    changed = code.replace("logits = self.lm_head(", "logits = 2 * self.lm_head(", 1)
    assert changed != code
    path.write_text(changed, encoding="utf-8")
    assert not verify(dense, str(moe), num_sequences=1, sequence_length=8).equal


def no_weights(moe):
    (moe / "model.safetensors").unlink()


def truncated(moe):
    (moe / "model.safetensors").write_bytes((moe / "model.safetensors").read_bytes()[:1000])


def no_config(moe):
    (moe / "config.json").unlink()


def impossible_config(moe):
    config = json.loads((moe / "config.json").read_text(encoding="utf-8"))
    (moe / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 99}), encoding="utf-8")


@pytest.mark.parametrize("spoil", [no_weights, truncated, no_config, impossible_config])
def test_a_spoiled_checkpoint_is_refused_in_one_line(spoiled, spoil):
    dense, moe = spoiled
    spoil(moe)
    with pytest.raises(SettingsError, match=r"cannot be loaded|there is no config") as error:
        verify(dense, str(moe))
    assert str(moe) in str(error.value)


def test_models_of_different_vocabularies_are_refused(pair, tmp_path):
    other = write_dense(tmp_path / "other", vocab_size=64, tokenizer=False)
    with pytest.raises(SettingsError, match=r"has 320 tokens, .* has 64: they cannot be parent and child"):
        verify(str(other), str(pair[1]))


@pytest.mark.parametrize("settings", [{"num_sequences": 0}, {"sequence_length": -1}])
def test_nothing_to_compare_is_refused(pair, settings):
    with pytest.raises(SettingsError, match="must be at least 1"):
        verify(pair[0], str(pair[1]), **settings)
