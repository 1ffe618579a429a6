"""Several processes train as one does on the same global batch, and save the same checkpoint."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from training_runs import ROOT, TRAIN_SCRIPT, command_line, run_script

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.train.balancing import BalancingMixin
from upcycled_moe.train.train import main


pytestmark = pytest.mark.distributed

FSDP_SCRIPT = Path(__file__).with_name("fsdp_on_cpu.py")
# What `accelerate launch` sets from train/configs/accelerate/fsdp2.yaml.
FSDP_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
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
    output_dir = tmp_path / "two_processes"
    result = run_script({**settings, "output_dir": output_dir, "expected_processes": 2}, num_processes=2)

    assert result.returncode == 0, result.stderr
    assert "2 processes, 256 tokens a step" in result.stderr
    _assert_same_run(output_dir, one_process)


def test_accelerate_launch_with_cpu_is_not_mistaken_for_two_processes(settings, tmp_path):
    config = ROOT / "train" / "configs" / "accelerate" / "ddp.yaml"
    settings |= {"output_dir": tmp_path / "out", "expected_processes": 2}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--cpu"]
    command += ["--num_processes", "2", str(TRAIN_SCRIPT), *command_line(settings)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "expected_processes=2, but 1 started" in result.stderr


@pytest.mark.parametrize("use_router_bias", [False, True])
def test_sharded_processes_train_as_one_and_save_what_loads_anywhere(
    settings, make_moe_checkpoint, tmp_path, use_router_bias
):
    settings |= {"model_name_or_path": make_moe_checkpoint(use_router_bias=use_router_bias)}
    environment = {**FSDP_ENVIRONMENT, "FSDP_CPU_RAM_EFFICIENT_LOADING": str(not use_router_bias).lower()}
    assert main(command_line({**settings, "output_dir": tmp_path / "one_process"})) == 0
    output_dir = tmp_path / "fsdp"
    result = run_script(
        {**settings, "output_dir": output_dir, "save_strategy": "steps", "save_steps": 3},
        num_processes=2,
        script=FSDP_SCRIPT,
        **environment,
    )
    assert result.returncode == 0, result.stderr
    _assert_same_run(output_dir, tmp_path / "one_process")

    for folder in (output_dir, output_dir / "checkpoint-6"):
        config = json.loads((folder / "config.json").read_text())
        assert len(config["auto_map"]) == 4
        assert config["architectures"] == ["UpcycledQwenMoeForCausalLM"]
        _load_as_remote_code(folder)
    if use_router_bias:
        return  # that biases resume is tested with one process

    resumed = tmp_path / "resumed"
    shutil.copytree(output_dir / "checkpoint-3", resumed / "checkpoint-3")
    result = run_script(
        {**settings, "output_dir": resumed, "resume_from_checkpoint": "last"},
        num_processes=2,
        script=FSDP_SCRIPT,
        **environment,
    )
    assert result.returncode == 0, result.stderr
    weights, expected = (load_file(folder / "model.safetensors") for folder in (resumed, output_dir))
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


def test_loading_that_cannot_bring_biases_along_is_refused(settings, tmp_path):
    settings |= {"output_dir": tmp_path / "out"}
    result = run_script(settings, num_processes=1, script=FSDP_SCRIPT, **FSDP_ENVIRONMENT)
    assert result.returncode != 0
    assert "set it to false in the accelerate configuration" in result.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_sharding_that_converts_biases_is_refused():
    """FSDP version 1, which itself does not start on a CPU."""
    plugin = SimpleNamespace(fsdp_version=1, cpu_ram_efficient_loading=False)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
    with pytest.raises(SettingsError, match="set fsdp_version to 2"):
        BalancingMixin._check_biases_can_be_sharded(trainer)


def _load_as_remote_code(folder):
    script = (
        "import sys; sys.modules['modeling_upcycled_moe'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "newly initialized" not in result.stderr
