"""Routers that are trained otherwise than the rest, and steps without a finite gradient."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training_runs import command_line

from upcycled_moe.train import trainer as trainer_module
from upcycled_moe.train.train import main


@pytest.fixture
def settings(settings, moe_checkpoint):
    return {**settings, "model_name_or_path": moe_checkpoint, "logging_steps": 1, "save_strategy": "steps"}


def _train(settings, output_dir):
    assert main(command_line({**settings, "output_dir": output_dir})) == 0
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "lm_loss" in entry]


def _moved(folder, earlier):
    """Return which weights of two checkpoints differ, as the sets of routers' and of other names."""
    weights, before = (load_file(path / "model.safetensors") for path in (folder, earlier))
    names = {name for name in weights if not torch.equal(weights[name], before[name])}
    names = {name for name in names if not name.endswith("e_score_correction_bias")}
    routers = {name for name in names if ".mlp.gate." in name}
    return routers, names - routers


def test_routers_are_trained_first_and_the_rest_is_held(settings, moe_checkpoint, tmp_path):
    settings |= {"router_warmup_steps": 3, "warmup_steps": 2, "lr_decay_points": [], "router_learning_rate": 1e-2}
    log = _train({**settings, "save_steps": 3}, tmp_path / "out")

    routers, others = _moved(tmp_path / "out" / "checkpoint-3", moe_checkpoint)
    assert len(routers) == 2
    assert not others
    optimizer = torch.load(tmp_path / "out" / "checkpoint-3" / "optimizer.pt")
    assert sum(bool(state["exp_avg"].any()) for state in optimizer["state"].values()) == len(routers)
    routers, others = _moved(tmp_path / "out", tmp_path / "out" / "checkpoint-3")
    assert len(routers) == 2
    assert len(others) > 10
    assert [entry["learning_rate"] for entry in log] == pytest.approx([0, 0, 0, 2.5e-3, 5e-3, 5e-3])
    assert [entry["router_learning_rate"] for entry in log] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2])


def test_routers_with_a_learning_rate_of_zero_stay(settings, moe_checkpoint, tmp_path):
    _train({**settings, "router_learning_rate": 0, "max_steps": 2}, tmp_path / "out")
    routers, others = _moved(tmp_path / "out", moe_checkpoint)
    assert not routers
    assert len(others) > 10


@pytest.mark.parametrize("setting", ["router_learning_rate", "router_warmup_steps"])
def test_a_model_without_routers_is_refused(settings, dense_checkpoint, tmp_path, capsys, setting):
    settings |= {"model_name_or_path": dense_checkpoint, "output_dir": tmp_path / "out", setting: 1}
    assert main(command_line(settings)) == 2
    assert f"{setting} is given, but the model has no router parameters to train" in capsys.readouterr().err


@pytest.fixture
def poison(monkeypatch):
    """`poison(steps)`: let the loss of these steps, from 1, be NaN."""

    def poison(steps):
        compute_loss = trainer_module.UpcyclingTrainer.compute_loss

        def poisoned(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = compute_loss(self, model, inputs, True, num_items_in_batch)
            if model.training and self.state.global_step + 1 in steps:
                loss = loss * math.nan
            return (loss, outputs) if return_outputs else loss

        monkeypatch.setattr(trainer_module.UpcyclingTrainer, "compute_loss", poisoned)

    return poison


# Without clipping the norm is computed in another place.
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_without_a_finite_gradient_is_left_out(settings, tmp_path, poison, capsys, max_grad_norm):
    poison({3})
    settings |= {"save_steps": 1, "logging_steps": 2, "max_grad_norm": max_grad_norm}
    log = _train(settings, tmp_path / "out")

    before, after = tmp_path / "out" / "checkpoint-2", tmp_path / "out" / "checkpoint-3"
    # Buffers too: the routers' biases.
    assert (before / "model.safetensors").read_bytes() == (after / "model.safetensors").read_bytes()
    states = [torch.load(folder / "optimizer.pt")["state"] for folder in (before, after)]
    assert all(torch.equal(states[0][key]["exp_avg"], states[1][key]["exp_avg"]) for key in states[0])
    assert _moved(tmp_path / "out" / "checkpoint-4", after)[1]
    assert "warning: step 3: the norm of the gradients is nan; the step is left out" in capsys.readouterr().err
    # The log of steps 3 and 4 is of step 4 alone.
    assert [entry.get("skipped_steps") for entry in log] == [None, 1, 1]
    assert all(math.isfinite(value) for entry in log for name, value in entry.items() if name != "grad_norm")
    # The step counts as the one before, not as nothing.
    assert all(entry["loss"] > 5 and entry["lm_loss"] > 5 for entry in log)


def test_a_run_without_any_finite_gradient_fails(settings, tmp_path, poison, capsys):
    poison({3, 4, 5, 6})
    settings |= {"max_skipped_steps": 2, "save_steps": 2, "output_dir": tmp_path / "out"}
    assert main(command_line(settings)) == 1
    assert "step 5: the norm of the gradients is nan, in 3 steps in a row" in capsys.readouterr().err
    routers, others = _moved(tmp_path / "out" / "checkpoint-4", tmp_path / "out" / "checkpoint-2")
    assert not routers | others


def _resumed(settings, output_dir, tmp_path, **changed):
    """Return the exit status of going on from the checkpoint of step 2 with changed settings, and the log."""
    resumed = tmp_path / "resumed"
    shutil.copytree(output_dir / "checkpoint-2", resumed / "checkpoint-2")
    settings = {**settings, **changed, "output_dir": resumed, "resume_from_checkpoint": "last"}
    status = main(command_line(settings))
    if status:
        return status, None
    log = json.loads((resumed / "trainer_state.json").read_text())["log_history"]
    return status, [entry for entry in log if "lm_loss" in entry]


@pytest.fixture
def short_run(settings, tmp_path):
    settings |= {"save_steps": 2, "max_steps": 4, "lr_decay_points": []}
    _train(settings, tmp_path / "out")
    return settings, tmp_path / "out"


def test_a_resumed_run_has_the_settings_that_it_is_given(short_run, tmp_path):
    settings, output_dir = short_run
    status, log = _resumed(settings, output_dir, tmp_path, learning_rate=1e-4, weight_decay=0.5, adam_beta1=0.7)
    assert status == 0
    assert [entry["learning_rate"] for entry in log] == pytest.approx([5e-3, 5e-3, 1e-4, 1e-4])
    groups = torch.load(tmp_path / "resumed" / "checkpoint-4" / "optimizer.pt")["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}
    assert {tuple(group["betas"]) for group in groups} == {(0.7, 0.95)}


@pytest.mark.parametrize(
    "changed", [{"router_learning_rate": 1e-3}, {"optim": "sgd"}], ids=lambda changed: next(iter(changed))
)
def test_an_optimizer_of_other_settings_is_refused(short_run, tmp_path, capsys, changed):
    settings, output_dir = short_run
    assert _resumed(settings, output_dir, tmp_path, **changed)[0] == 2
    assert "resume with the same optim, and with router_learning_rate" in capsys.readouterr().err
