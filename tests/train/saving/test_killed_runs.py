"""Runs that are killed, signalled or out of disk lose no checkpoint, and go on as if nothing had happened."""

import hashlib
import random
import resource
import signal
import socket

import pytest
from training_processes import started

from upcycled_moe.train.saving.checkpoints import checkpoint_folders, fault_of
from upcycled_moe.train.saving.staging import STAGING_FOLDER


MAX_STEPS = 8


@pytest.fixture(scope="module")
def interruptible(moe_checkpoint, train_files):
    """Settings with noise on the router's input, so that the random states count, and a checkpoint after each step."""
    return {
        "model_name_or_path": moe_checkpoint,
        "train_data": train_files,
        "max_steps": MAX_STEPS,
        "block_size": 64,
        "router_jitter_noise": 0.1,
        "save_steps": 1,
        "save_total_limit": 2,
        "logging_steps": 1,
        "resume_from_checkpoint": "auto",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


@pytest.fixture(scope="module")
def uninterrupted(interruptible, tmp_path_factory):
    """The digest of the final model of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with started({**interruptible, "output_dir": folder / "out"}, folder / "log") as process:
        assert process.wait() == 0, process.output()
    return _digest(folder / "out")


def _digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def _assert_whole(output_dir):
    for folder in checkpoint_folders(output_dir):
        assert fault_of(folder) is None, folder


def _random_path(output_dir, rng):
    """Return a file or folder that the run will make next, mostly while it saves."""
    saved = [int(folder.name.removeprefix("checkpoint-")) for folder in checkpoint_folders(output_dir)]
    step = max(saved, default=0) + rng.choice((1, 2))
    if step > MAX_STEPS:
        staged = output_dir / STAGING_FOLDER / "model"
        return rng.choice([staged, staged / "config.json", staged / "moving.json", output_dir / "trainer_state.json"])
    staged = output_dir / STAGING_FOLDER / f"checkpoint-{step}"
    names = ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "data_position.json")
    return rng.choice([staged, *(staged / name for name in names), output_dir / f"checkpoint-{step}"])


@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    interruptible, uninterrupted, tmp_path, num_kills
):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    output_dir, killed_at = tmp_path / "out", []
    for attempt in range(num_kills):
        with started({**interruptible, "output_dir": output_dir}, tmp_path / f"log_{attempt}") as process:
            path = _random_path(output_dir, rng)
            process.wait_until(path.exists)
            process.send(signal.SIGKILL)
            status = process.wait()
        killed_at.append((str(path.relative_to(output_dir)), status))
        assert status in (-signal.SIGKILL, 0), (seed, killed_at, process.output())
        _assert_whole(output_dir)
    with started({**interruptible, "output_dir": output_dir}, tmp_path / "log") as process:
        assert process.wait() == 0, (seed, killed_at, process.output())
    assert _digest(output_dir) == uninterrupted, (seed, killed_at)
    assert not (output_dir / STAGING_FOLDER).exists()
    assert len(checkpoint_folders(output_dir)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_ends_a_run_after_a_checkpoint_from_which_it_goes_on(interruptible, uninterrupted, tmp_path, number):
    settings = {**interruptible, "output_dir": tmp_path / "out", "save_strategy": "no"}
    with started(settings, tmp_path / "log") as process:
        process.wait_until(lambda: "'lm_loss'" in process.output())
        process.send(number)
        # A scheduler may signal the process, and the launcher pass the signal on.
        process.send(number)
        assert process.wait() == 128 + number, process.output()

    [checkpoint] = checkpoint_folders(tmp_path / "out")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    last_line = process.output().splitlines()[-1]
    assert last_line == (
        f"train.py: stopped by {number.name} after step {step} of {MAX_STEPS}; {checkpoint} is saved, continue with "
        "the same command and resume_from_checkpoint=last."
    )
    assert not (tmp_path / "out" / "config.json").exists()
    with started(settings, tmp_path / "log_resumed") as process:
        assert process.wait() == 0, process.output()
    assert _digest(tmp_path / "out") == uninterrupted


def test_processes_stop_after_the_same_step_though_one_was_signalled(interruptible, tmp_path):
    settings = {**interruptible, "output_dir": tmp_path / "out", "max_steps": 10_000, "save_strategy": "no"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    with (
        started(settings, tmp_path / "log_0", RANK="0", LOCAL_RANK="0", **common) as first,
        started(settings, tmp_path / "log_1", RANK="1", LOCAL_RANK="1", **common) as second,
    ):
        first.wait_until(lambda: "'lm_loss'" in first.output())
        second.send(signal.SIGTERM)
        assert second.wait() == first.wait() == 128 + signal.SIGTERM, first.output() + second.output()
    [checkpoint] = checkpoint_folders(tmp_path / "out")
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    _assert_whole(tmp_path / "out")


@pytest.mark.parametrize("what", ["model.safetensors", "optimizer.pt"])
def test_a_disk_without_room_for_a_checkpoint_leaves_the_older_ones_whole(interruptible, tmp_path, what):
    """The system lets the process write no file as large as that one was before."""
    settings = {**interruptible, "output_dir": tmp_path / "out", "max_steps": 10_000}
    with started(settings, tmp_path / "log") as process:
        first = tmp_path / "out" / "checkpoint-1"
        process.wait_until(first.exists)
        limit = (first / what).stat().st_size - 1
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        assert process.wait() == 1, process.output()

    last_line = process.output().splitlines()[-1]
    assert last_line.startswith("train.py: checkpoint-")
    assert "Older checkpoints are whole; remove some of them" in last_line
    assert not (tmp_path / "out" / STAGING_FOLDER).exists()
    assert len(checkpoint_folders(tmp_path / "out")) >= 1
    _assert_whole(tmp_path / "out")
