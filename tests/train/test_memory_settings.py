"""Settings that save memory: the same training with less of it, or a line that says why not."""

import importlib.util
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from training_runs import command_line

from modeling_upcycled_moe.chunked_loss_upcycled_moe import chunked_causal_lm_loss
from modeling_upcycled_moe.routers_upcycled_moe import MixtureRouter
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.train.arguments import ModelArguments
from upcycled_moe.train.model import load_model, load_tokenizer
from upcycled_moe.train.train import main


def _train(settings, model, output_dir, **more):
    """Return the log of a run, and its weights."""
    assert main(command_line({**settings, "model_name_or_path": model, "output_dir": output_dir, **more})) == 0
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "lm_loss" in entry], load_file(output_dir / "model.safetensors")


def _refusal(settings, capsys, **more):
    """Return what the script says of settings that it refuses."""
    assert main(command_line({**settings, **more})) == 2
    return capsys.readouterr().err


def _assert_same_training(first, second, tolerance):
    for entry, expected in zip(first[0], second[0], strict=True):
        for name in ("loss", "lm_loss", "router/aux_loss", "router/z_loss", "router/entropy", "router/max_violation"):
            assert entry[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
    for name, weight in first[1].items():
        # Adam turns small differences of small gradients into larger ones of weights.
        torch.testing.assert_close(weight, second[1][name], rtol=0, atol=10 * tolerance)


def test_the_loss_in_chunks_trains_the_same(settings, moe_checkpoint, train_files, tmp_path, monkeypatch):
    chunks = []

    def record(lm_head, hidden_states, labels, chunk_tokens, **inputs):
        chunks.append(chunk_tokens)
        return chunked_causal_lm_loss(lm_head, hidden_states, labels, chunk_tokens, **inputs)

    monkeypatch.setattr("modeling_upcycled_moe.modeling_upcycled_moe.chunked_causal_lm_loss", record)
    settings |= {"max_steps": 2, "gradient_accumulation_steps": 2, "eval_data": train_files, "max_eval_blocks": 2}
    runs = [_train(settings, moe_checkpoint, tmp_path / str(size), loss_chunk_tokens=size) for size in (0, 50)]
    assert set(chunks) == {50}
    _assert_same_training(*runs, 1e-5)
    _train(settings, moe_checkpoint, tmp_path / "default", max_steps=1)
    assert set(chunks) == {50, 1024}


def test_a_loss_in_chunks_that_the_model_does_not_know_is_refused(settings, dense_checkpoint, tmp_path, capsys):
    settings |= {"model_name_or_path": dense_checkpoint, "output_dir": tmp_path}
    assert "qwen2 models know no such loss" in _refusal(settings, capsys, loss_chunk_tokens=64)
    assert "loss_chunk_tokens=-1 is negative" in _refusal(settings, capsys, loss_chunk_tokens=-1)


def test_routers_are_kept_in_float32_while_the_rest_trains_in_bfloat16(settings, make_moe_checkpoint, tmp_path):
    checkpoint = make_moe_checkpoint()
    name = "model.layers.1.mlp.gate.keys"
    settings |= {"max_steps": 1, "dtype": "bfloat16", "learning_rate": 1e-5}

    _, weights = _train(settings, checkpoint, tmp_path / "first")
    _, further = _train(settings, tmp_path / "first", tmp_path / "second", learning_rate=0.0)
    _, stock = _train(settings, checkpoint, tmp_path / "stock", router_dtype="model")

    assert {key for key, weight in weights.items() if weight.dtype == torch.float32} == {
        name,
        "model.layers.1.mlp.gate.query_weight",
    }
    # Smaller than a step of bfloat16, and still there after loading and saving.
    assert not torch.equal(weights[name], weights[name].bfloat16().float())
    assert torch.equal(further[name], weights[name])
    assert stock[name].dtype == torch.bfloat16
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("first", "stock")]
    assert [config.get("router_dtype") for config in configs] == ["float32", None]


def test_router_logits_are_float32_under_autocast(settings, moe_checkpoint, tmp_path, monkeypatch):
    dtypes = set()
    score = MixtureRouter.score

    def record(self, hidden_states):
        logits = score(self, hidden_states)
        dtypes.add(logits.dtype)
        return logits

    monkeypatch.setattr(MixtureRouter, "score", record)
    _train(settings, moe_checkpoint, tmp_path / "float32", max_steps=1, bf16=True)
    assert dtypes == {torch.float32}
    _train(settings, moe_checkpoint, tmp_path / "stock", max_steps=1, bf16=True, router_dtype="model")
    assert dtypes == {torch.float32, torch.bfloat16}


def test_float32_routers_that_cannot_be_sharded_are_refused(make_moe_checkpoint, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model_args = ModelArguments(model_name_or_path=str(make_moe_checkpoint()), dtype="bfloat16")
    tokenizer = load_tokenizer(model_args)

    with pytest.raises(SettingsError, match="set dtype=float32 with bf16=true, or router_dtype=model"):
        load_model(model_args, tokenizer, 64)
    load_model(replace(model_args, router_dtype="model"), tokenizer, 64)
    load_model(replace(model_args, dtype="float32"), tokenizer, 64)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    load_model(model_args, tokenizer, 64)


@pytest.mark.parametrize("options", [None, "{every_n_layers: 2}", "{preserve_rng_state: true}"])
def test_gradient_checkpointing_trains_the_same(settings, moe_checkpoint, tmp_path, options):
    """Noise on the routers' input must be the same when a layer is computed again, and figures be counted once."""
    settings |= {"max_steps": 3, "logging_steps": 1, "router_jitter_noise": 0.1}
    checkpointing = {"gradient_checkpointing": True}
    if options is not None:
        checkpointing["gradient_checkpointing_kwargs"] = options
    plain = _train(settings, moe_checkpoint, tmp_path / "plain")
    checkpointed = _train(settings, moe_checkpoint, tmp_path / "checkpointed", **checkpointing)

    assert plain[0][1]["grad_norm"] == pytest.approx(checkpointed[0][1]["grad_norm"], rel=1e-5)
    _assert_same_training(checkpointed, plain, 1e-6)


@pytest.mark.parametrize("noise", ["router_jitter_noise", "attention_dropout"])
def test_noise_that_would_be_another_when_computed_again_is_refused(make_moe_checkpoint, monkeypatch, noise):
    model_args = ModelArguments(model_name_or_path=str(make_moe_checkpoint(**{noise: 0.1})))
    tokenizer = load_tokenizer(model_args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    load_model(model_args, tokenizer, 64)
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    with pytest.raises(SettingsError, match=f"{noise}=0.1, but with fsdp_activation_checkpointing"):
        load_model(model_args, tokenizer, 64)


def test_checkpointing_that_cuts_router_losses_off_is_refused(settings, moe_checkpoint, tmp_path, capsys):
    settings |= {"model_name_or_path": moe_checkpoint, "output_dir": tmp_path, "gradient_checkpointing": True}
    message = _refusal(settings, capsys, gradient_checkpointing_kwargs="{use_reentrant: true}")
    assert "use_reentrant=true would cut router losses off" in message


@pytest.mark.parametrize(
    ("optim", "package", "bytes_per_weight"),
    [
        ("adafactor", "transformers", 1),
        # Small tensors and embeddings keep float32 states.
        ("adamw_bnb_8bit", "bitsandbytes", 5.5),
        ("paged_adamw_8bit", "bitsandbytes", 5.5),
        # Compiles a kernel.
        pytest.param("adamw_torch_8bit", "torchao", 5.5, marks=pytest.mark.slow),
    ],
)
def test_optimizers_with_small_states_train_and_resume_bit_by_bit(
    settings, moe_checkpoint, tmp_path, optim, package, bytes_per_weight
):
    pytest.importorskip(package)
    settings |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": optim}
    _, weights = _train(settings, moe_checkpoint, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    _, resumed = _train(settings, moe_checkpoint, tmp_path / "resumed", resume_from_checkpoint="last")

    start = load_file(moe_checkpoint / "model.safetensors")
    experts = "model.layers.1.mlp.experts.down_proj"
    assert not torch.equal(weights[experts], start[experts])
    for name, weight in weights.items():
        assert torch.equal(resumed[name], weight), name
    # AdamW's float32 moments take 8 bytes a weight.
    num_weights = sum(weight.numel() for weight in weights.values())
    assert (tmp_path / "whole" / "checkpoint-4" / "optimizer.pt").stat().st_size < bytes_per_weight * num_weights


@pytest.mark.parametrize(("optim", "package"), [("paged_adamw_8bit", "bitsandbytes"), ("adamw_torch_8bit", "torchao")])
def test_an_optimizer_that_is_not_installed_is_named(
    settings, moe_checkpoint, tmp_path, capsys, monkeypatch, optim, package
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    settings |= {"model_name_or_path": moe_checkpoint, "output_dir": tmp_path}
    message = _refusal(settings, capsys, optim=optim)
    assert f"optim={optim} needs {package}, which is not installed" in message
    assert "pip install 'upcycled-moe[optimizers]'" in message
