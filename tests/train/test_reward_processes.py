"""Reward models in two processes, each with a whole model."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_reward import ROOT, command_line, converted, dense_run, inputs, moe_settings  # noqa: F401 (fixtures)

from upcycled_moe.train.reward import main


pytestmark = pytest.mark.distributed
FIGURES = ("loss", "preference_loss", "router/aux_loss", "router/z_loss", "router/max_violation")


def test_two_processes_train_as_one_does_with_twice_the_accumulation(moe_settings, tmp_path):  # noqa: F811
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(command_line({**moe_settings, "output_dir": one, "gradient_accumulation_steps": 2})) == 0
    settings = {**moe_settings, "output_dir": two, "gradient_accumulation_steps": 1}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(ROOT / "train" / "reward.py"), *command_line(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stderr
    assert "# 2 processes, 4 pairs a step" in (two / "training_config.yaml").read_text()
    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, two)]
    for expected, entry in zip(*logs, strict=True):
        for name in (*FIGURES, *(key for key in expected if key.startswith(("router/layer_", "eval_")))):
            if name in expected and "runtime" not in name:
                assert entry[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (entry["step"], name)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (two, one))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
