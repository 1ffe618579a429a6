"""A job whose process is lost does not hang, and torchrun takes it up again by itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import TRAIN_SCRIPT, command_line

from upcycled_moe.train.saving.checkpoints import checkpoint_folders, fault_of
from upcycled_moe.train.train import main


pytestmark = pytest.mark.distributed


def _children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _start(settings, log, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *options]
    return subprocess.Popen(
        [*command, str(TRAIN_SCRIPT), *command_line(settings)],
        stdout=log,
        stderr=log,
        # Otherwise a restarted process may find the addresses of those that ended (pytorch/pytorch#135712).
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def _kill_a_worker_when(path, job):
    deadline = time.monotonic() + 120
    while job.poll() is None and not path.exists():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)
    os.kill(_children(job.pid)[1], signal.SIGKILL)


@pytest.fixture
def settings(settings, moe_checkpoint, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4, "resume_from_checkpoint": "auto", "tokens_per_step": 256}
    model = {"model_name_or_path": moe_checkpoint, "output_dir": tmp_path / "out"}
    return {**settings, **saving, **model, "max_steps": 20}


def test_torchrun_takes_up_a_job_that_lost_a_process(settings, tmp_path):
    with (tmp_path / "log").open("w+") as log:
        job = _start(settings, log, "--max-restarts", "1")
        _kill_a_worker_when(settings["output_dir"] / "checkpoint-4", job)
        status = job.wait(timeout=180)
        log.seek(0)
        printed = log.read()
    assert status == 0, printed
    assert f"from {settings['output_dir']}/checkpoint-" in printed

    assert main(command_line({**settings, "output_dir": tmp_path / "one_process"})) == 0
    weights, expected = (
        load_file(path / "model.safetensors") for path in (tmp_path / "out", tmp_path / "one_process")
    )
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_job_that_lost_a_process_ends_and_leaves_whole_checkpoints(settings, tmp_path):
    settings["max_steps"] = 10_000
    with (tmp_path / "log").open("w") as log:
        job = _start(settings, log)
        _kill_a_worker_when(settings["output_dir"] / "checkpoint-4", job)
        assert job.wait(timeout=120) != 0
    assert checkpoint_folders(tmp_path / "out")
    for folder in checkpoint_folders(tmp_path / "out"):
        assert fault_of(folder) is None
