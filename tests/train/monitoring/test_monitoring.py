"""What a run shows of itself: gradients, speed, and files about its routing that leave training as it is."""

import itertools
import json
import math
import shutil

import pytest
import torch
from process_groups import run_group
from safetensors.torch import load_file, save_file
from training_runs import command_line
from transformers import AutoConfig

from upcycled_moe.common.flops import training_flops_per_token
from upcycled_moe.common.routing import selection_overlap
from upcycled_moe.common.routing_log import read_routing
from upcycled_moe.common.settings import SettingsError
from upcycled_moe.train.arguments import parse_arguments
from upcycled_moe.train.monitoring.probes import PROBE_FOLDER, ProbeFolder
from upcycled_moe.train.train import main
from upcycled_moe.train.trainer import UpcyclingTrainer


NUM_EXPERTS = 4


@pytest.fixture
def settings(settings, moe_checkpoint):
    return {**settings, "model_name_or_path": moe_checkpoint, "router_probe_steps": 2, "router_probe_tokens": 100}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They are tested by themselves, and take longer than all else."""
    monkeypatch.setattr("upcycled_moe.train.monitoring.routing_view.can_draw", lambda: False)


def _train(settings, output_dir, **more):
    assert main(command_line({**settings, "output_dir": output_dir, **more})) == 0
    log = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "lm_loss" in entry]


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def noisy_checkpoint(make_moe_checkpoint):
    """Its training draws random numbers."""
    return make_moe_checkpoint(router_jitter_noise=0.1, attention_dropout=0.1)


def test_probes_change_nothing_of_the_training(settings, noisy_checkpoint, tmp_path):
    settings |= {"model_name_or_path": noisy_checkpoint}
    probed = _train(settings, tmp_path / "probed")
    unprobed = _train(settings, tmp_path / "unprobed", router_probe_steps=0)

    assert len(ProbeFolder(tmp_path / "probed").steps()) == 4
    assert not (tmp_path / "unprobed" / PROBE_FOLDER).exists()
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("probed", "unprobed"))
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name
    added = {f"router/{layer}{name}" for layer in ("", "layer_01/") for name in ("change_rate", "kept_from_start")}
    for entry, reference in zip(probed, unprobed, strict=True):
        assert entry.keys() - reference.keys() == added
        figures = [name for name in reference if name != "tokens_per_second"]
        assert [entry[name] for name in figures] == [reference[name] for name in figures]


def test_probes_tell_which_selections_changed_and_stayed(settings, train_files, tmp_path):
    """The text is evaluation text where there is some: a block of each domain, then the next of each."""
    settings |= {"eval_data": train_files, "max_eval_blocks": 3, "logging_steps": 1, "learning_rate": 5e-2}
    log = _train(settings, tmp_path / "out", max_steps=5)

    probes = ProbeFolder(tmp_path / "out")
    assert probes.steps() == [0, 2, 4, 5]
    text = probes.read_text()
    assert text["input_ids"].shape == text["position_ids"].shape == (2, 64)
    selected = [probes.read(step) for step in probes.steps()]
    assert selected[0].shape == (1, 128, 2)
    assert selected[0].dtype == torch.uint8
    logged = {entry["step"]: entry for entry in log if "router/change_rate" in entry}
    assert list(logged) == [2, 4]
    for entry, (before, now) in zip(logged.values(), itertools.pairwise(selected), strict=False):
        common = [len(set(one) & set(other)) for one, other in zip(before[0].tolist(), now[0].tolist(), strict=True)]
        assert entry["router/layer_01/change_rate"] == pytest.approx(1 - sum(common) / 256)
    assert logged[2]["router/kept_from_start"] == pytest.approx(1 - logged[2]["router/change_rate"])
    assert logged[4]["router/kept_from_start"] == pytest.approx(
        selection_overlap(selected[0], selected[2], NUM_EXPERTS).item()
    )
    assert 0 < logged[2]["router/change_rate"] < 1

    saturation = json.loads((tmp_path / "out" / "router_saturation.json").read_text())
    assert saturation["steps"] == [0, 2, 4, 5]
    expected = [selection_overlap(one, selected[-1], NUM_EXPERTS).item() for one in selected]
    assert saturation["layers"] == {"1": pytest.approx(expected, abs=1e-6)}
    assert saturation["mean"][-1] == 1


def test_a_resumed_run_goes_on_with_the_files(settings, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    _train(settings, whole, save_strategy="steps", save_steps=3, logging_steps=1)
    # Stopped after the last step was logged and probed, before it was saved.
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoint-6")
    (resumed / "router_saturation.json").unlink()
    with (resumed / "routing.jsonl").open("a") as file:
        file.write('{"step": 7, "num_to')
    _train(settings, resumed, save_strategy="steps", save_steps=3, logging_steps=1, resume_from_checkpoint="last")

    assert [entry["step"] for entry in read_routing(resumed / "routing.jsonl")] == [1, 2, 3, 4, 5, 6]
    for name in ("routing.jsonl", "router_saturation.json"):
        assert (resumed / name).read_text() == (whole / name).read_text()
    assert _files(resumed / PROBE_FOLDER) == _files(whole / PROBE_FOLDER)

    _train(settings, tmp_path / "again", max_steps=2)
    _train(settings, tmp_path / "again", max_steps=1, logging_steps=1)
    assert [entry["step"] for entry in read_routing(tmp_path / "again" / "routing.jsonl")] == [1]
    assert ProbeFolder(tmp_path / "again").steps() == [0, 1]


def test_probes_of_a_run_that_kept_no_positions_go_on(settings, tmp_path):
    """They are compared with one another, so the text stays as it was."""
    _train(settings, tmp_path, save_strategy="steps", save_steps=3, max_steps=3)
    probes = ProbeFolder(tmp_path)
    text = probes.read_text()
    assert text["input_ids"].shape == text["position_ids"].shape == (2, 64)
    earlier = {"input_ids": text["input_ids"]}
    probes.write_text(earlier)
    _train(settings, tmp_path, save_strategy="steps", save_steps=3, resume_from_checkpoint="last")
    assert probes.read_text().keys() == earlier.keys()
    assert probes.steps() == [0, 2, 3, 4, 6]


def test_files_that_cannot_be_written_do_not_stop_a_run(settings, tmp_path, capsys):
    (tmp_path / "out" / "routing.jsonl").mkdir(parents=True)
    (tmp_path / "out" / PROBE_FOLDER).touch()
    assert len(_train(settings, tmp_path / "out")) == 3
    warnings = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert len([line for line in warnings if "routing.jsonl" in line]) == 1
    assert len([line for line in warnings if PROBE_FOLDER in line]) == 1


def test_gradient_norms_of_the_groups_make_up_the_whole(settings, tmp_path):
    for entry in _train(settings, tmp_path / "out", router_warmup_steps=2, lr_decay_points=[]):
        norms = {name.removeprefix("grad_norm/"): value for name, value in entry.items() if "grad_norm/" in name}
        if entry["step"] == 2:
            assert norms.keys() == {"routers"}
        else:
            assert norms.keys() == {"embeddings", "attention", "routers", "experts", "mlp", "norms", "head"}
        # Before clipping, which most of the steps need.
        assert math.hypot(*norms.values()) == pytest.approx(entry["grad_norm"], rel=1e-5)
        assert min(norms.values()) > 0


def test_a_step_that_is_left_out_has_no_norms(settings, tmp_path, monkeypatch):
    original = UpcyclingTrainer.compute_loss

    def poisoned(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = original(self, model, inputs, num_items_in_batch=num_items_in_batch)
        return loss * (math.nan if self.state.global_step == 1 else 1.0)

    monkeypatch.setattr(UpcyclingTrainer, "compute_loss", poisoned)
    log = _train(settings, tmp_path / "out", max_steps=3, logging_steps=1)
    assert [any(name.startswith("grad_norm/") for name in entry) for entry in log] == [True, False, True]


def test_use_of_the_device_follows_from_its_peak(settings, moe_checkpoint, tmp_path):
    log = _train(settings, tmp_path / "out", peak_flops_per_device=1e12, max_steps=2)
    flops_per_token = training_flops_per_token(AutoConfig.from_pretrained(moe_checkpoint), 64)
    assert log[0]["mfu"] == pytest.approx(log[0]["tokens_per_second"] * flops_per_token / 1e12)


def test_a_dense_model_has_no_routing_to_show(settings, dense_checkpoint, tmp_path):
    log = _train(settings, tmp_path / "out", model_name_or_path=dense_checkpoint, max_steps=2)
    assert {"grad_norm/attention", "grad_norm/mlp"} < log[0].keys()
    assert not [name for name in log[0] if name.startswith("router")]
    assert not list((tmp_path / "out").glob("rout*"))


def test_a_run_tells_of_a_layer_that_collapsed(settings, make_moe_checkpoint, tmp_path, capsys):
    """With a bias that outweighs all scores every token gets the same experts."""
    checkpoint = make_moe_checkpoint(use_router_bias=True, router_bias_update_rate=0.0)
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.layers.1.mlp.gate.selector.e_score_correction_bias"] = torch.tensor([0.0, 5.0, 9.0, 0.0])
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    _train(settings, tmp_path / "out", model_name_or_path=checkpoint, per_device_train_batch_size=4)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "collapsed" in line]
    assert len(warnings) == 1
    assert "step 4: routing has collapsed in layer 1" in warnings[0]
    assert "2 of 4 experts get none" in warnings[0]


@pytest.mark.distributed
def test_sharded_processes_show_what_one_shows(settings, tmp_path):
    settings |= {"max_steps": 4, "tokens_per_step": 256, "router_probe_steps": 4}
    reference = _train(settings, tmp_path / "one")
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }
    settings |= {"output_dir": tmp_path / "two"}
    statuses = run_group(settings, tmp_path / "output.txt", num_processes=2, **environment)

    assert statuses == [0, 0], (tmp_path / "output.txt").read_text()
    log = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    for entry, expected in zip(log, reference, strict=False):
        shown = [name for name in expected if name.startswith("grad_norm")]
        assert len(shown) == 8
        assert [entry[name] for name in shown] == pytest.approx([expected[name] for name in shown], rel=1e-4)
    probes, expected = (ProbeFolder(tmp_path / name) for name in ("two", "one"))
    assert probes.steps() == [0, 4]
    for step in probes.steps():
        assert torch.equal(probes.read(step), expected.read(step))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("router_probe_steps=-1", "router_probe_steps=-1 is negative"),
        ("router_probe_tokens=-5", "router_probe_tokens=-5 is negative"),
        ("router_collapse_threshold=1.5", "router_collapse_threshold=1.5 must be from 0"),
        ("peak_flops_per_device=0", "peak_flops_per_device=0 must be above 0"),
    ],
)
def test_impossible_settings_are_refused(settings, tmp_path, setting, message):
    name, _, value = setting.partition("=")
    with pytest.raises(SettingsError, match=message):
        parse_arguments(command_line({**settings, "output_dir": tmp_path / "out", name: value}))
