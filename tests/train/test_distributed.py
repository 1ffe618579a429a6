"""Several processes train as one does on the same global batch, and save the same checkpoint."""

import json
import socket
from pathlib import Path

import pytest
import torch
from process_groups import run_group
from safetensors.torch import load_file
from training_runs import ROOT, TRAIN_SCRIPT, command_line

from upcycled_moe.train.train import main


pytestmark = pytest.mark.distributed

ACCELERATE = "from accelerate.commands.accelerate_cli import main; main()"
FSDP_SCRIPT = Path(__file__).with_name("engines_on_cpu.py")
ROUTER_FIGURES = ("lm_loss", "loss", "router/aux_loss", "router/z_loss", "router/entropy", "router/max_violation")


@pytest.fixture
def settings(settings, moe_checkpoint, train_files):
    # Its routers have biases, which every process must move by the loads of all.
    # The router losses of the checkpoint have weights above zero; three blocks a domain do not share out evenly.
    return {
        **settings,
        "model_name_or_path": moe_checkpoint,
        "eval_data": train_files,
        "max_eval_blocks": 3,
        "per_device_eval_batch_size": 2,
        "tokens_per_step": 256,
        "logging_steps": 1,
    }


@pytest.fixture
def one_process(settings, tmp_path):
    output_dir = tmp_path / "one_process"
    assert main(command_line({**settings, "output_dir": output_dir})) == 0
    return output_dir


def _log(output_dir):
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"]


def _assert_same_run(output_dir, reference):
    for entry, expected in zip(_log(output_dir), _log(reference), strict=True):
        assert entry["step"] == expected["step"]
        for key in expected:
            if key in ROUTER_FIGURES or key.startswith("router/layer_") or key.endswith(("_loss", "_perplexity")):
                assert entry[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-5), (entry["step"], key)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (output_dir, reference))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


def test_two_processes_train_as_one(settings, one_process, tmp_path):
    output_dir, log = tmp_path / "two_processes", tmp_path / "log"
    settings |= {"output_dir": output_dir, "expected_processes": 2}

    assert run_group(settings, log, num_processes=2, with_engines=False) == [0, 0], log.read_text()
    assert "2 processes, 256 tokens a step" in log.read_text()
    _assert_same_run(output_dir, one_process)


def test_accelerate_launch_with_cpu_is_not_mistaken_for_two_processes(warm_python, settings, tmp_path):
    settings |= {"output_dir": tmp_path / "out", "expected_processes": 2}
    result = _launch(warm_python, "ddp.yaml", TRAIN_SCRIPT, settings, "--cpu")
    assert result.returncode != 0
    assert "expected_processes=2, but 1 started" in result.stderr


def test_accelerate_launch_shards_and_saves_what_loads_anywhere(warm_python, settings, one_process, tmp_path):
    """Weights of the first process alone, and biases, which FSDP2 does not shard, reach the other one."""
    output_dir = tmp_path / "fsdp2"
    settings |= {"output_dir": output_dir, "expected_processes": 2}
    result = _launch(warm_python, "fsdp2.yaml", FSDP_SCRIPT, settings)
    assert result.returncode == 0, result.stderr
    _assert_same_run(output_dir, one_process)
    config = json.loads((output_dir / "config.json").read_text())
    assert len(config["auto_map"]) == 4
    assert config["architectures"] == ["UpcycledQwenMoeForCausalLM"]
    _load_as_remote_code(warm_python, output_dir)


def test_accelerate_launch_starts_whole_copies(warm_python, settings, one_process, tmp_path):
    settings |= {"output_dir": tmp_path / "ddp", "expected_processes": 2, "ddp_backend": "gloo"}
    result = _launch(warm_python, "ddp.yaml", TRAIN_SCRIPT, settings)
    assert result.returncode == 0, result.stderr
    _assert_same_run(tmp_path / "ddp", one_process)


def _launch(python, config, script, settings, *options):
    """Run the launcher; the processes that it starts import all for themselves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = ["launch", "--config_file", ROOT / "train" / "configs" / "accelerate" / config, "--num_processes", 2]
    command += ["--mixed_precision", "no", "--main_process_port", port, *options, script, *command_line(settings)]
    return python.run(ACCELERATE, *command, OMP_NUM_THREADS="1")


def _load_as_remote_code(python, folder):
    script = (
        "import sys; sys.modules['modeling_upcycled_moe'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    result = python.run(script, folder)
    assert result.returncode == 0, result.stderr
    assert "newly initialized" not in result.stderr
