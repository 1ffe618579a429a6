"""Only whole checkpoints are resumed from; what is cut short is named."""

import json
import shutil

import pytest
from training_runs import command_line

from upcycled_moe.train.saving.checkpoints import checkpoint_folders, fault_of
from upcycled_moe.train.train import main


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, moe_checkpoint, train_files):
    """A run of two steps with a checkpoint after each."""
    output_dir = tmp_path_factory.mktemp("finished_run")
    settings = {
        "model_name_or_path": moe_checkpoint,
        "output_dir": output_dir,
        "train_data": train_files,
        "max_steps": 2,
        "block_size": 64,
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    assert main(command_line(settings)) == 0
    return settings


@pytest.fixture
def run(finished_run, tmp_path):
    """The settings of a copy of that run, for a test to break."""
    shutil.copytree(finished_run["output_dir"], tmp_path / "run")
    return {**finished_run, "output_dir": tmp_path / "run"}


def _empty(file):
    file.write_bytes(b"")


def _halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _delete(file):
    file.unlink()


BROKEN = [
    *((name, damage) for name in ("trainer_state.json", "data_position.json") for damage in (_empty, _halve)),
    *((name, _delete) for name in ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt")),
    *((name, _halve) for name in ("model.safetensors", "optimizer.pt", "rng_state.pth")),
    ("rng_state.pth", _delete),
]


@pytest.mark.parametrize(("name", "damage"), BROKEN, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_checkpoint_is_named_and_never_resumed(run, capsys, name, damage):
    newest = run["output_dir"] / "checkpoint-2"
    damage(newest / name)

    assert main(command_line({**run, "resume_from_checkpoint": newest})) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"train.py: resume_from_checkpoint={newest}: not a complete checkpoint: {name} is ")

    assert main(command_line({**run, "resume_from_checkpoint": "last"})) == 0
    printed = capsys.readouterr().err
    assert f"warning: {newest} is passed over: {name} is" in printed
    assert f"from {run['output_dir'] / 'checkpoint-1'}" in printed
    assert fault_of(newest) is None


def test_without_a_whole_checkpoint_last_fails_and_auto_begins_anew(run, capsys):
    for folder in run["output_dir"].glob("checkpoint-*"):
        (folder / "optimizer.pt").unlink()
    (run["output_dir"] / "trainer_state.json").unlink()  # a run with its final model is finished

    assert main(command_line({**run, "resume_from_checkpoint": "last"})) == 2
    assert "holds no complete checkpoint" in capsys.readouterr().err
    assert main(command_line({**run, "resume_from_checkpoint": "auto"})) == 0
    printed = capsys.readouterr().err
    assert printed.count("is passed over: optimizer.pt is missing") == 2
    assert f"from {run['model_name_or_path']}" in printed


def _as_of_fsdp(folder):
    (folder / "optimizer.pt").rename(folder / "optimizer.bin")
    (folder / "pytorch_model_fsdp_0").mkdir()
    (folder / "pytorch_model_fsdp_0" / ".metadata").touch()


def _as_of_deepspeed(folder):
    (folder / "global_step2").mkdir()
    (folder / "optimizer.pt").rename(folder / "global_step2" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    (folder / "latest").write_text(str(folder / "global_step2"))


def _as_sharded_at_load(folder):
    (folder / "optimizer.pt").unlink()
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0" / ".metadata").touch()


@pytest.mark.parametrize(
    ("turn", "name"),
    [
        (_as_of_fsdp, "FSDP"),
        (_as_of_deepspeed, "DeepSpeed"),
        (_as_sharded_at_load, "tensor_parallel_size or expert_parallel_size above 1"),
    ],
    ids=["fsdp", "deepspeed", "sharded_at_load"],
)
def test_checkpoints_of_another_engine_are_named_and_stay(run, capsys, turn, name):
    """Even where only the newest is another engine's: it may be that of a run that went on."""
    newest = run["output_dir"] / "checkpoint-2"
    turn(newest)
    (run["output_dir"] / "trainer_state.json").unlink()

    for way in ("last", "auto", newest):
        settings = {**run, "resume_from_checkpoint": way, "save_total_limit": 1, "max_steps": 3}
        assert main(command_line(settings)) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"train.py: resume_from_checkpoint={way}: {newest} was saved with {name}, this run has whole copies of "
            "the model, and an optimizer is only resumed in the same way; start in that way, or choose another "
            "output_dir for a new run."
        )
        assert [folder.name for folder in checkpoint_folders(run["output_dir"])] == ["checkpoint-1", "checkpoint-2"]


def test_a_plain_checkpoint_is_none_of_a_sharded_run(run, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(command_line({**run, "resume_from_checkpoint": "auto", "max_steps": 3})) == 2
    assert "was saved with whole copies of the model, this run has FSDP" in capsys.readouterr().err


def test_going_back_keeps_later_checkpoints_and_says_which_is_newest(run, capsys):
    output_dir = run["output_dir"]
    shutil.copytree(output_dir / "checkpoint-2", output_dir / "checkpoint-9")
    settings = {**run, "resume_from_checkpoint": output_dir / "checkpoint-1", "save_total_limit": 1}
    assert main(command_line(settings)) == 0
    assert f"warning: {output_dir / 'checkpoint-9'} stays until this run comes to its step" in capsys.readouterr().err
    assert [folder.name for folder in checkpoint_folders(output_dir)] == ["checkpoint-2", "checkpoint-9"]


def test_the_random_states_of_all_processes_count(run):
    checkpoint = run["output_dir"] / "checkpoint-2"
    position = json.loads((checkpoint / "data_position.json").read_text())
    (checkpoint / "data_position.json").write_text(json.dumps({**position, "num_processes": 2}))
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")

    assert fault_of(checkpoint) == "rng_state_1.pth is missing"
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    assert fault_of(checkpoint) is None


def test_a_sharded_run_looks_for_its_own_files(run):
    checkpoint = run["output_dir"] / "checkpoint-2"
    assert fault_of(checkpoint, engine="fsdp") == "pytorch_model_fsdp.bin is missing"

    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer.bin")
    (checkpoint / "pytorch_model_fsdp_0").mkdir()
    assert fault_of(checkpoint, engine="fsdp") == "pytorch_model_fsdp_0 is cut short"
    (checkpoint / "pytorch_model_fsdp_0" / ".metadata").touch()
    assert fault_of(checkpoint, engine="fsdp") is None
    assert fault_of(checkpoint) == "optimizer.pt is missing"


def test_a_deepspeed_run_looks_for_what_its_last_file_names(run):
    checkpoint = run["output_dir"] / "checkpoint-2"
    states = checkpoint / "global_step2"
    states.mkdir()
    for name in ("model", "optim"):
        shutil.copy(checkpoint / "optimizer.pt", states / f"zero_pp_rank_0_mp_rank_00_{name}_states.pt")
    assert fault_of(checkpoint, engine="deepspeed") == "latest is missing"

    (checkpoint / "latest").write_text("global_step2")
    assert fault_of(checkpoint, engine="deepspeed") is None
    _halve(states / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert "optim_states.pt is empty or cut short" in fault_of(checkpoint, engine="deepspeed")
    (checkpoint / "latest").write_text("")
    assert "has no model states" in fault_of(checkpoint, engine="deepspeed")


def test_resuming_keeps_to_what_can_be_resumed(run, train_files, capsys):
    assert main(command_line({**run, "resume_from_checkpoint": "auto", "save_only_model": True})) == 2
    assert "save_only_model=true keeps no optimizer" in capsys.readouterr().err

    assert main(command_line({**run, "resume_from_checkpoint": "last"})) == 2
    assert "checkpoint-2 is at step 2 of max_steps=2, so nothing is left to train" in capsys.readouterr().err

    more = {**run, "max_steps": 3, "resume_from_checkpoint": "last"}
    assert main(command_line({**more, "train_data": train_files[:1]})) == 2
    assert "was saved with 2 files or datasets in train_data, this run has 1" in capsys.readouterr().err


def test_a_position_that_is_not_written_to_its_end_leaves_the_old_one(run, monkeypatch):
    from upcycled_moe.train.data import blocks as data

    file = run["output_dir"] / "checkpoint-2" / "data_position.json"
    before = file.read_bytes()

    def disk_is_full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(data.os, "fsync", disk_is_full)
    assert main(command_line({**run, "resume_from_checkpoint": file.parents[1] / "checkpoint-1"})) == 1
    assert file.read_bytes() == before
