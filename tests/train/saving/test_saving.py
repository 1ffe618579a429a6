"""Which checkpoints a run keeps, what it puts into them, and what it says of the disk and of signals."""

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


def test_a_checkpoint_has_the_settings_of_its_run(settings):
    assert main(command_line({**settings, "max_steps": 1})) == 0
    saved = (settings["output_dir"] / "checkpoint-1" / "training_config.yaml").read_text()
    assert saved == (settings["output_dir"] / "training_config.yaml").read_text()
    assert yaml.safe_load(saved)["learning_rate"] == settings["learning_rate"]


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
