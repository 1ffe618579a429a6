"""Which checkpoints a run keeps, what it puts into them, and what it says of the disk and of signals."""

import importlib.metadata
import json
import math
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import ROOT, command_line

from upcycled_moe.train.saving import disk_space
from upcycled_moe.train.saving.checkpoints import checkpoint_folders
from upcycled_moe.train.saving.disk_space import space_warning
from upcycled_moe.train.train import main
from upcycled_moe.train.trainer import UpcyclingTrainer


@pytest.fixture
def settings(settings, moe_checkpoint, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    return {**settings, **saving, "model_name_or_path": moe_checkpoint, "output_dir": tmp_path / "out", "max_steps": 4}


def test_the_best_checkpoint_is_kept_and_becomes_the_final_model(settings, train_files):
    """With this learning rate the loss gets worse from the first step on."""
    settings |= {"eval_data": train_files, "max_eval_blocks": 1, "eval_steps": 1, "learning_rate": 3.0}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 2}
    assert main(command_line({**settings, "warmup_steps": 0, "lr_decay_points": [1.0]})) == 0

    output_dir = settings["output_dir"]
    assert [folder.name for folder in checkpoint_folders(output_dir)] == ["checkpoint-1", "checkpoint-4"]
    for folder in (output_dir, *checkpoint_folders(output_dir)):
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(output_dir / "checkpoint-1")
    best, final = (load_file(folder / "model.safetensors") for folder in (output_dir / "checkpoint-1", output_dir))
    assert all(torch.equal(best[name], final[name]) for name in best)
    # That of the last step's model would be another one.
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    assert log[-1]["eval_loss"] == losses[0]
    # Provenance and card tell of the steps that the weights have had.
    (trained,) = json.loads((output_dir / "upcycling.json").read_text())["steps"]
    assert {name: trained[name] for name in ("steps", "best_of_steps", "tokens", "evaluation_step")} == {
        "steps": 1,
        "best_of_steps": 4,
        "tokens": 128,
        "evaluation_step": 1,
    }
    assert trained["evaluation"]["all"] == losses[0]
    assert "for 1 step (the best of 4 steps), 128 tokens" in (output_dir / "README.md").read_text()
    (last,) = json.loads((output_dir / "checkpoint-4" / "upcycling.json").read_text())["steps"]
    assert (last["steps"], "best_of_steps" in last) == (4, False)


def test_ruined_weights_do_not_take_the_place_of_good_ones_nor_become_the_final_model(settings, capsys):
    """The fourth step has a finite gradient and a learning rate that ruins the weights."""
    settings |= {"max_steps": 8, "warmup_steps": 0, "lr_decay_points": [0.375], "lr_decay_factor": 1e38}
    settings |= {"save_total_limit": 2, "max_skipped_steps": 5}
    output_dir = settings["output_dir"]
    assert main(command_line(settings)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("train.py: the last 4 of 8 steps were left out")
    assert f"continue from resume_from_checkpoint={output_dir / 'checkpoint-3'}, with a lower learning_rate" in message
    assert {"checkpoint-3", "checkpoint-4"} < {folder.name for folder in checkpoint_folders(output_dir)}
    assert not (output_dir / "model.safetensors").exists()

    # A start from what was saved since does not forget it.
    for max_steps, num_skipped in ((8, 4), (9, 5)):
        assert main(command_line({**settings, "max_steps": max_steps, "resume_from_checkpoint": "auto"})) == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith(f"train.py: the last {num_skipped} of {max_steps} steps were left out")
        assert f"resume_from_checkpoint={output_dir / 'checkpoint-3'}," in message
    assert not (output_dir / "model.safetensors").exists()

    settings |= {"resume_from_checkpoint": output_dir / "checkpoint-3", "learning_rate": 1e-30}
    assert main(command_line({**settings, "lr_decay_factor": 1.0, "max_steps": 9})) == 0
    assert [folder.name for folder in checkpoint_folders(output_dir)] == ["checkpoint-8", "checkpoint-9"]


def test_outputs_use_the_cache_as_the_start_does(settings):
    start = json.loads((settings["model_name_or_path"] / "config.json").read_text())
    assert start["use_cache"] is True
    assert main(command_line({**settings, "max_steps": 1})) == 0
    for folder in (settings["output_dir"], settings["output_dir"] / "checkpoint-1"):
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True


def test_a_checkpoint_has_the_settings_of_its_run(settings):
    assert main(command_line({**settings, "max_steps": 1})) == 0
    saved = (settings["output_dir"] / "checkpoint-1" / "training_config.yaml").read_text()
    assert saved == (settings["output_dir"] / "training_config.yaml").read_text()
    assert yaml.safe_load(saved)["learning_rate"] == settings["learning_rate"]


@pytest.mark.parametrize("batch", [{"tokens_per_step": 256}, {"gradient_accumulation_steps": 2}], ids=str)
def test_the_settings_that_are_stored_say_what_was_used_and_repeat_the_run(settings, tmp_path, batch):
    settings |= {"max_steps": 2, "save_total_limit": 1, "seed": 3, **batch}
    assert main(command_line(settings)) == 0
    config = settings["output_dir"] / "training_config.yaml"
    stored = yaml.safe_load(config.read_text())
    expected = {
        **{"seed": 3, "data_seed": 3, "optim": "adamw_torch_fused", "adam_epsilon": 1e-8, "save_total_limit": 1},
        **{"max_grad_norm": 1.0, "bf16": False, "fp16": False, "router_dtype": "float32", "loss_chunk_tokens": 1024},
        **{"router_aux_loss_coef": 0.05, "router_z_loss_coef": 0.01, "router_bias_update_rate": 0.001},
        **{"router_entropy_loss_coef": 0.0, "router_jitter_noise": 0.0, **batch},
    }
    assert {name: stored[name] for name in expected} == expected
    assert not {"tokens_per_step", "gradient_accumulation_steps"} <= {name for name in stored if stored[name]}
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("upcycled-moe", "transformers", "torch")]
    comment = [line for line in config.read_text().splitlines() if line.startswith("# ")]
    assert all(text in comment[0] for text in versions)
    assert comment[1:] == [
        "# 1 processes with whole copies of the model, mixed precision no",
        "# 256 tokens a step, in 2 micro-batches of each process",
    ]

    assert main(["--config", str(config), f"output_dir={tmp_path / 'again'}"]) == 0
    first, again = (folder / "model.safetensors" for folder in (settings["output_dir"], tmp_path / "again"))
    assert first.read_bytes() == again.read_bytes()
    again = (tmp_path / "again" / "training_config.yaml").read_text()
    assert again == config.read_text().replace(str(settings["output_dir"]), str(tmp_path / "again"))


def test_the_settings_of_a_dense_model_are_stored_too(settings, dense_checkpoint, tmp_path):
    settings |= {"max_steps": 1, "model_name_or_path": dense_checkpoint}
    assert main(command_line(settings)) == 0
    config = settings["output_dir"] / "training_config.yaml"
    assert main(["--config", str(config), f"output_dir={tmp_path / 'again'}"]) == 0


Usage = namedtuple("Usage", ["free"])


def test_a_disk_that_will_be_full_is_warned_of_at_the_start(settings, capsys, monkeypatch):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: Usage(400_000))
    assert main(command_line({**settings, "max_steps": 2, "save_total_limit": 1})) == 0
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "free, and this run will need" in line]
    assert "has 400 kB free" in warning
    assert "2 x 6" in warning

    # What it foretells is what the files take.
    checkpoint = settings["output_dir"] / "checkpoint-2"
    sizes = [(checkpoint / name).stat().st_size for name in ("model.safetensors", "optimizer.pt")]
    needed = float(warning.split("need about ")[1].split(" MB")[0]) * 1e6
    assert needed == pytest.approx(2 * sum(sizes) + sizes[0], rel=0.1)


@pytest.mark.parametrize(
    ("more", "num_checkpoints"),
    [
        ({"save_strategy": "no"}, 0),
        ({"save_steps": 30}, 4),
        ({"save_steps": 0.5}, 2),
        ({"save_steps": 1, "save_total_limit": 3}, 4),
    ],
    ids=str,
)
def test_as_many_checkpoints_are_reckoned_with_as_will_be_there(tmp_path, monkeypatch, more, num_checkpoints):
    from transformers import TrainingArguments

    args = TrainingArguments(**{"output_dir": str(tmp_path), "max_steps": 100, "save_strategy": "steps", **more})
    model = torch.nn.Linear(100, 100)
    weights = 4 * 10_100
    for free, fits in ((weights * (1 + 3 * num_checkpoints), True), (weights * (1 + 3 * num_checkpoints) - 1, False)):
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path, free=free: Usage(free))
        assert (space_warning(args, model, resumed=None) is None) == fits


def test_the_same_signal_again_ends_the_process_at_once():
    script = (
        "import os, signal, sys\n"
        "from upcycled_moe.train.saving import signals\n"
        "listener = signals.StopSignals()\n"
        "with listener.listening():\n"
        "    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):\n"
        "        os.kill(os.getpid(), number)\n"
        "    assert listener.received == signal.SIGUSR1\n"
        "    print('still here', flush=True)\n"
        "    signals.REPEAT_SECONDS = 0\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('too late')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == -signal.SIGTERM, result.stderr
    assert result.stdout == "still here\n"


def test_handlers_of_signals_are_as_before_after_a_run(settings):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    assert main(command_line({**settings, "max_steps": 1})) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_the_stop_of_transformers_is_refused_in_favour_of_this_one(settings, capsys):
    assert main(command_line({**settings, "enable_jit_checkpoint": True})) == 2
    assert "enable_jit_checkpoint=true" in capsys.readouterr().err
    assert not list(settings["output_dir"].glob("checkpoint-*"))


def test_a_run_with_a_step_left_out_resumes_bit_by_bit_and_saves_no_nan(settings, monkeypatch, capsys, tmp_path):
    compute_loss = UpcyclingTrainer.compute_loss

    def poisoned(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = compute_loss(self, model, inputs, True, num_items_in_batch)
        loss = loss * math.nan if self.state.global_step == 1 else loss
        return (loss, outputs) if return_outputs else loss

    monkeypatch.setattr(UpcyclingTrainer, "compute_loss", poisoned)
    assert main(command_line(settings)) == 0
    assert "warning: step 2: the norm of the gradients is nan" in capsys.readouterr().err
    for folder in checkpoint_folders(settings["output_dir"]):
        moments = torch.load(folder / "optimizer.pt")["state"].values()
        tensors = [*load_file(folder / "model.safetensors").values(), *(state["exp_avg_sq"] for state in moments)]
        assert all(tensor.isfinite().all() for tensor in tensors), folder

    resumed = tmp_path / "resumed"
    shutil.copytree(settings["output_dir"] / "checkpoint-2", resumed / "checkpoint-2")
    assert main(command_line({**settings, "output_dir": resumed, "resume_from_checkpoint": "last"})) == 0
    whole, again = (folder / "model.safetensors" for folder in (settings["output_dir"], resumed))
    assert whole.read_bytes() == again.read_bytes()
