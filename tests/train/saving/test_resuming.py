"""A resumed run has all weights of its checkpoint, however the model's class writes them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_runs import SHAPE, command_line
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.train.saving.resuming import load_weights
from upcycled_moe.train.saving.staging import STAGING_FOLDER
from upcycled_moe.train.train import main


def _stock_moe():
    """Transformers' own, which is saved with one tensor per expert and trained with one for all."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **experts, head_dim=8))


def _tied_dense():
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True))


@pytest.mark.parametrize("make_model", [_stock_moe, _tied_dense])
def test_a_resumed_run_of_a_stock_model_equals_an_uninterrupted_one(settings, tokenizer, tmp_path, make_model):
    torch.manual_seed(0)
    model = make_model()
    start, whole, resumed = (tmp_path / name for name in ("start", "whole", "resumed"))
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    settings |= {"model_name_or_path": start, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}

    assert main(command_line({**settings, "output_dir": whole})) == 0
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    assert main(command_line({**settings, "output_dir": resumed, "resume_from_checkpoint": "last"})) == 0

    weights, expected = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    before = load_file(whole / "checkpoint-2" / "model.safetensors")
    assert not any(torch.equal(before[name], expected[name]) for name in expected if "experts" in name)


def test_weights_of_several_types_keep_their_values_and_types(tmp_path):
    model = _stock_moe().to(torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.gate.float()
        torch.nn.init.normal_(layer.mlp.gate.weight)
    model.save_pretrained(tmp_path)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)

    load_weights(model, tmp_path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    experts = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **experts, head_dim=8)).save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="weights for this Qwen3MoeForCausalLM"):
        load_weights(_stock_moe(), tmp_path)


def test_a_finished_run_is_told_so_and_a_missing_final_model_is_made_from_the_last_checkpoint(
    settings, moe_checkpoint, train_files, tmp_path, capsys
):
    settings |= {"model_name_or_path": moe_checkpoint, "output_dir": tmp_path, "resume_from_checkpoint": "auto"}
    settings |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    settings |= {"eval_data": train_files, "max_eval_blocks": 1}
    assert main(command_line(settings)) == 0
    expected = (tmp_path / "model.safetensors").read_bytes()
    last_log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"][-1]
    capsys.readouterr()

    # As where a kill comes after the last move.
    (tmp_path / STAGING_FOLDER / "model").mkdir(parents=True)
    assert main(command_line(settings)) == 0
    assert f"{tmp_path} holds the final model of step 4; nothing is left to train." in capsys.readouterr().err
    assert not (tmp_path / STAGING_FOLDER).exists()

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).unlink()
    assert main(command_line(settings)) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == expected
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert state["log_history"][-1]["eval_loss"] == last_log["eval_loss"]
