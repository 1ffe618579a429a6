"""A run that pushes: its final model arrives, nothing else does, and nothing that fails there costs the model."""

import pytest
from hub_stand_in import Repository, running_hub, sha256
from training_runs import command_line
from transformers import TrainingArguments

from upcycled_moe.train.errors import RunEnded
from upcycled_moe.train.saving.pushing import destination_of, push_final_model
from upcycled_moe.train.train import main


@pytest.fixture
def hub(monkeypatch):
    with running_hub(monkeypatch) as server:
        yield server


@pytest.fixture
def settings(settings, moe_checkpoint, tmp_path):
    run = {"model_name_or_path": moe_checkpoint, "output_dir": tmp_path / "out", "max_steps": 2, "logging_steps": 1}
    hub = {"push_to_hub": True, "hub_model_id": "org/trained"}
    return {**settings, **run, **hub, "save_strategy": "steps", "save_steps": 1}


def test_only_the_final_model_is_pushed(hub, settings, capsys):
    assert main(command_line(settings)) == 0
    out, files = settings["output_dir"], hub.files("org/trained")
    assert hub.repositories["org/trained"].is_private
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json", "training_config.yaml"} <= files.keys()
    assert all((out / path).read_bytes() == content for path, content in files.items())
    assert f"Pushed to {hub.endpoint}/org/trained, commit " in capsys.readouterr().out
    # One commit, after the one that is there from the beginning.
    assert len(hub.repositories["org/trained"].branches["main"]) == 2
    assert (out / "checkpoint-1" / "optimizer.pt").is_file()
    unwanted = {"trainer_state.json", "training_args.bin"}
    assert all((out / name).is_file() for name in unwanted)
    assert not unwanted & files.keys()
    assert not [path for path in files if "/" in path or path.endswith((".pt", ".pth"))]
    # In two parts.
    assert hub.sent_objects() == 2 * [sha256((out / "model.safetensors").read_bytes())]


def test_a_push_that_fails_leaves_the_model_and_says_how_to_push_it(hub, settings, capsys):
    hub.fail = lambda request: 507 if request.method == "PUT" else None
    assert main(command_line(settings)) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    out = settings["output_dir"]
    assert message.startswith(f"train.py: {out} is written, but not on the Hub: org/trained: the Hub failed (507 ")
    assert message.endswith(f"Push it with `upcycled-moe push {out} org/trained`.")
    assert (out / "model.safetensors").is_file()
    assert (out / "trainer_state.json").is_file()
    # Nor does it take another training.
    hub.fail = lambda request: None
    assert main(command_line({**settings, "resume_from_checkpoint": "auto"})) == 0
    shown = capsys.readouterr()
    assert f"Pushed to {hub.endpoint}/org/trained, commit " in shown.out
    assert "nothing is left to train" in shown.err
    assert hub.files("org/trained")["model.safetensors"] == (out / "model.safetensors").read_bytes()


def test_an_interrupted_push_says_how_to_go_on(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("upcycled_moe.hub.push.push_written", interrupt)
    args = TrainingArguments("out", push_to_hub=True, hub_model_id="org/trained", use_cpu=True)
    with pytest.raises(
        RunEnded, match="out holds the final model, and `upcycled-moe push out org/trained` goes on"
    ) as ended:
        push_final_model(args)
    assert ended.value.status == 130


@pytest.mark.parametrize("private", [None, True, False])
def test_private_unless_told_otherwise(private):
    args = TrainingArguments(
        "out", push_to_hub=True, hub_model_id="org/trained", hub_private_repo=private, use_cpu=True
    )
    assert destination_of(args).private is (private is not False)


def test_a_public_repository_is_refused_before_training(hub, settings, capsys):
    hub.repositories["org/trained"] = Repository(is_private=False)
    assert main(command_line(settings)) == 2
    assert "org/trained: is public on the Hub" in capsys.readouterr().err
    assert not settings["output_dir"].exists()


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"hub_strategy": "every_save"}, "hub_strategy=every_save: only the final model goes to the Hub"),
        ({"hub_strategy": "checkpoint"}, "hub_strategy=checkpoint: only the final model goes to the Hub"),
        ({"hub_always_push": True}, "hub_always_push=true: only the final model goes to the Hub"),
        ({"hub_model_id": "trained"}, "'trained' is no repository of the Hub"),
        ({"push_to_hub": None}, "hub_model_id says how push_to_hub=true uploads the model; set both, or leave it"),
        ({"hub_model_id": None}, "push_to_hub=true, but not where to; set hub_model_id=org/name"),
    ],
)
def test_settings_that_are_refused(settings, capsys, given, error):
    settings = {name: value for name, value in {**settings, **given}.items() if value is not None}
    assert main(command_line(settings)) == 2
    assert error in capsys.readouterr().err
