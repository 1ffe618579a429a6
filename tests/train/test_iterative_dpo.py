"""Rounds of DPO from the command line: what they write, what they are held to, and going on after a stop."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense_checkpoints import byte_level_tokenizer, folder_hashes, write_dense
from moe_checkpoints import write_checkpoint
from safetensors.torch import load_file
from training_runs import ROOT, command_line

from upcycled_moe.preference.scoring import load_reward_model, score_conversations
from upcycled_moe.train import iterative_dpo
from upcycled_moe.train.preference import dpo_trainer, references, rounds
from upcycled_moe.train.preference.round_pairs import read_rows


TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
WORDS = ("the", "of", "and", "to", "in", "is", "that", "it")
SETTINGS = {
    "num_rounds": 2,
    "reference": "learned",
    "max_length": 48,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_steps": 2,
    "merge_share": 0.2,
    "merge_max_steps": 3,
    "merge_batch_size": 2,
    "use_cpu": True,
}


def write_pairs(path: Path, num_pairs: int) -> Path:
    """Write pairs whose chosen answer repeats the question, with one more, whose prompt is too long, to `path`."""
    rows = []
    for number in range(num_pairs):
        word, other = WORDS[number % len(WORDS)], WORDS[(number * 3 + 1) % len(WORDS)]
        prompt = [{"role": "user", "content": f"{word} {number}"}]
        answers = {"chosen": f"{word} {number}", "rejected": f"{other} and {other}"}
        sides = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
        rows.append({"prompt": prompt, **sides, "source": ("even", "odd")[number % 2]})
    rows.append({**rows[0], "prompt": [{"role": "user", "content": "the " * 60}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return SETTINGS | {
        "model_name_or_path": write_dense(folder / "dense"),
        "chat_template": folder / "template.jinja",
        "train_data": write_pairs(folder / "train.jsonl", 20),
        "eval_data": write_pairs(folder / "test.jsonl", 6),
    }


@pytest.fixture(scope="session")
def finished(inputs, tmp_path_factory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert iterative_dpo.main(command_line({**inputs, "output_dir": folder})) == 0
    return folder


def not_learned(settings: dict) -> dict:
    """Return `settings` without those that only a learned reference has."""
    return {name: value for name, value in settings.items() if name not in ("merge_max_steps", "merge_batch_size")}


def results(folder: Path) -> dict[str, str]:
    """Return the hashes of what a run leaves, without what names its folder, and pictures."""
    named = ("training_config.yaml", "reference/upcycling.json", ".png")
    return {name: digest for name, digest in folder_hashes(folder).items() if not name.endswith(named)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_each_round_keeps_its_pairs_reference_policy_and_figures(finished, inputs):
    assert {path.name for path in (finished / "round-2").iterdir()} == {
        "eval_log_probs.parquet",
        "figures.json",
        "pairs.parquet",
        "policy",
        "reference",
        "reference.json",
        "reference.png",
        "reference_log_probs.parquet",
        "training_log.json",
    }
    rows = [json.loads(line) for line in (finished / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert rows[0]["accuracy"] == 0.5
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-6)
    assert set(rows[2]["accuracy_by_source"]) == {"even", "odd"}
    assert rows[2]["margin"] != 0
    steps = json.loads((finished / "round-2" / "policy" / "upcycling.json").read_text())["steps"]
    assert [(step["command"], step["round"], step["reference"]) for step in steps] == [
        ("iterative_dpo", 1, "learned"),
        ("iterative_dpo", 2, "learned"),
    ]


def test_rounds_share_the_pairs_and_learn_the_reference_from_others(finished, inputs):
    parts = [read_rows(finished / f"round-{number}" / "pairs.parquet")["prompt"] for number in (1, 2)]
    prompts = [prompt[0]["content"] for part in parts for prompt in part]
    assert len(prompts) == len(set(prompts)) == 21 - 4
    reference = json.loads((finished / "round-2" / "reference.json").read_text())
    assert reference["fit"]["num_train"] + reference["fit"]["num_heldout"] in (3, 4)


def test_a_policy_begins_where_the_one_before_ended_and_at_its_reference_in_the_first_round(finished):
    log = json.loads((finished / "round-1" / "training_log.json").read_text())
    # Nothing has moved yet: the log-probabilities that trl computes are those that were computed before.
    assert log[0]["loss"] == pytest.approx(0.693147, abs=2e-5)
    log = json.loads((finished / "round-2" / "training_log.json").read_text())
    assert abs(log[0]["loss"] - 0.693147) > 2e-4


def test_the_reference_is_the_merge_of_the_policies(finished, inputs):
    reference = json.loads((finished / "round-2" / "reference.json").read_text())
    (coefficients,) = reference["coefficients"].values()
    assert sum(coefficients) == pytest.approx(1)
    assert reference["fit"]["largest_relative_move"] > 0.01
    policies = [weights(inputs["model_name_or_path"]), weights(finished / "round-1" / "policy")]
    for name, tensor in weights(finished / "round-2" / "reference").items():
        expected = sum(c * policy[name].double() for c, policy in zip(coefficients, policies, strict=True))
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-7)


class StoppedError(Exception):
    """A run ends where a test wants it to."""


def stop(patch: pytest.MonkeyPatch, owner, name: str, call: int) -> None:
    """Let call number `call` of the function `name` of `owner` be the last thing that a run does."""
    function, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(name)
        if len(calls) == call:
            raise StoppedError(name)
        return result

    patch.setattr(owner, name, stopping)


# In the order in which a run comes by them: what is done is not done again.
STOPS = {
    "in the first files": (rounds, "write_rows", 1),
    "in a second file": (rounds, "write_rows", 2),
    "between checkpoints of the first round": (dpo_trainer.RoundTrainer, "training_step", 4),
    "as a checkpoint is written": (dpo_trainer.RoundTrainer, "_add_to_checkpoint", 1),
    "as a policy is written": (rounds, "write_provenance", 1),
    "with a policy that is not measured": (rounds, "pair_figures", 1),
    "with a reference that is learned and not noted": (references, "fit_coefficients", 1),
    "with a reference that is noted and not written": (references, "open_checkpoints", 2),
    "in the last round": (dpo_trainer.RoundTrainer, "training_step", 1),
}


FEW_STOPS = ("between checkpoints of the first round", "with a reference that is noted and not written")


@pytest.mark.parametrize("places", [FEW_STOPS, pytest.param(tuple(STOPS), marks=pytest.mark.slow)], ids=["few", "all"])
def test_a_run_that_is_stopped_anywhere_ends_in_the_same_files(inputs, finished, tmp_path, monkeypatch, places):
    arguments = command_line({**inputs, "output_dir": tmp_path / "out"})
    # Pictures are not compared, and take long.
    monkeypatch.setattr("upcycled_moe.common.pictures.can_draw", lambda: False)
    monkeypatch.setattr(references, "can_draw", lambda: False)
    for place in places:
        with monkeypatch.context() as patch:
            stop(patch, *STOPS[place])
            with pytest.raises(StoppedError):
                iterative_dpo.main(arguments)
    with monkeypatch.context() as patch:
        training_step = dpo_trainer.RoundTrainer.training_step

        def signalled(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return training_step(*args, **kwargs)

        patch.setattr(dpo_trainer.RoundTrainer, "training_step", signalled)
        assert iterative_dpo.main(arguments) == 143
    assert (tmp_path / "out" / "round-2" / "training" / "checkpoint-1").is_dir()
    assert iterative_dpo.main(arguments) == 0
    assert results(tmp_path / "out") == results(finished)


def test_a_finished_run_only_shows_its_figures(inputs, finished, capsys):
    before = folder_hashes(finished)
    assert iterative_dpo.main(command_line({**inputs, "output_dir": finished})) == 0
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["round", "accuracy"]
    assert folder_hashes(finished).keys() == before.keys()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"beta": 0.2}, "holds a run with beta=0.1, not 0.2"),
        ({"reference": "ema", "ema_decay": 1.0}, "ema_decay=1 is outside [0, 1)"),
        ({"reference": "uniform", "ema_decay": 0.5}, "ema_decay=0.5 has an effect only with reference=ema"),
        ({"reference": "best"}, "reference='best' has the wrong type; expected one of 'last', 'uniform'"),
        ({"round_data": "on_policy"}, "round_data=on_policy and reward_model"),
        ({"merge_share": 0}, "reference=learned needs pairs to learn from"),
        ({"num_round": 2}, "unknown key 'num_round'; did you mean 'num_rounds'?"),
        ({"sync_ref_model": True}, "unknown key 'sync_ref_model'"),
        ({"max_length": 4}, "every prompt is 4 tokens long or longer"),
        ({"eval_samples": 2, "max_new_tokens": 48}, "max_new_tokens=48 leaves no room for prompts in max_length=48"),
        ({"num_rounds": 30}, "training pairs cannot be shared out to num_rounds=30"),
        ({"router_aux_loss_coef": 0.1}, "is a qwen2 model without it"),
        ({"chat_template": "missing.jinja"}, "chat_template=missing.jinja: cannot be read"),
    ],
)
def test_bad_settings_are_one_line(inputs, finished, tmp_path, capsys, changed, message):
    folder = finished if "beta" in changed else tmp_path / "out"
    assert iterative_dpo.main(command_line({**inputs, "output_dir": folder, **changed})) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if message in line]
    assert line.startswith("iterative_dpo.py: ")


def test_a_folder_of_something_else_is_left_alone(inputs, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert iterative_dpo.main(command_line({**inputs, "output_dir": tmp_path})) == 2
    assert "is not empty and holds no run of iterative DPO" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward_model")
    write_checkpoint(folder, "classifier", num_labels=1)
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_a_mixture_of_experts_learns_from_its_own_answers(inputs, reward_model, tmp_path, monkeypatch):
    # It takes as long as the rest.
    monkeypatch.setattr("upcycled_moe.common.pictures.can_draw", lambda: False)
    settings = not_learned(inputs) | {
        "model_name_or_path": write_checkpoint(tmp_path / "moe", "shared", router_aux_loss_coef=0.01),
        "output_dir": tmp_path / "out",
        "num_rounds": 1,
        "reference": "last",
        "round_data": "on_policy",
        "reward_model": reward_model,
        "samples_per_prompt": 3,
        "max_new_tokens": 6,
        "eval_samples": 3,
        "eval_reward_model": reward_model,
    }
    assert iterative_dpo.main(command_line(settings)) == 0
    round_1 = tmp_path / "out" / "round-1"
    pairs = read_rows(round_1 / "pairs.parquet")
    assert 0 < len(pairs) <= 17
    for side, column in enumerate(("chosen", "rejected")):
        conversations = [pair["prompt"] + pair[column] for pair in pairs]
        scores = score_conversations(*load_reward_model(str(reward_model), device="cpu"), conversations)
        assert scores == pytest.approx([rewards[side] for rewards in pairs["rewards"]], abs=1e-4)
    assert all(best > worst for best, worst in pairs["rewards"])
    log = json.loads((round_1 / "training_log.json").read_text())
    assert all(step["router_loss"] > 0 and step["aux_loss"] > 0 for step in log)
    rows = [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]
    assert rows[0]["divergence"] == 0
    assert rows[1]["divergence"] != 0
    assert len(read_rows(round_1 / "eval_answers.parquet")["reward"]) == 3
    before, after = weights(tmp_path / "moe"), weights(round_1 / "policy")
    routers = [name for name in before if ".mlp.gate." in name]
    assert routers
    assert not any(torch.equal(before[name], after[name]) for name in routers)


def test_answers_of_one_reward_make_no_round_and_are_not_drawn_twice(
    inputs, reward_model, tmp_path, capsys, monkeypatch
):
    settings = not_learned(inputs) | {
        "output_dir": tmp_path / "out",
        "num_rounds": 1,
        "reference": "last",
        "round_data": "on_policy",
        "reward_model": reward_model,
        "samples_per_prompt": 2,
        "max_new_tokens": 4,
    }
    monkeypatch.setattr(
        rounds, "score_answers", lambda model, prompts, texts, *others: [[0.5] * len(drawn) for drawn in texts]
    )
    for _ in range(2):
        assert iterative_dpo.main(command_line(settings)) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert re.match(r"iterative_dpo.py: round 1: none of 1[67] prompts has answers of different reward; ", message)
        files = [path.name for path in (tmp_path / "out" / "round-1").iterdir()]
        assert files == ["answers.parquet"]
        monkeypatch.setattr(rounds, "sample_answers", None)


def test_what_is_no_reward_model_is_refused_before_anything_is_drawn(inputs, tmp_path, capsys):
    settings = inputs | {"output_dir": tmp_path / "out", "round_data": "on_policy", "max_new_tokens": 4}
    settings["reward_model"] = inputs["model_name_or_path"]
    assert iterative_dpo.main(command_line(settings)) == 2
    assert "its configuration names Qwen2ForCausalLM, but a reward model is" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_imports_nothing_heavy(warm_python):
    code = (
        "import sys; sys.modules.pop('torch', None); sys.path.insert(0, sys.argv[1]); import iterative_dpo; "
        "assert iterative_dpo.main(['--help']) == 0; print('upcycled_moe.train.preference.rounds' in sys.modules, "
        "'trl' in sys.modules)"
    )
    done = warm_python.run(code, ROOT / "train")
    assert done.returncode == 0, done.stderr
    assert "reference" in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"


def run_in_two_processes(settings: dict) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = str(ROOT / "train" / "iterative_dpo.py")
    done = subprocess.run([*launcher, script, *command_line(settings)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Policy of the last round") == 1


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_do_what_one_does_with_twice_the_accumulation(inputs, tmp_path):
    settings = not_learned(inputs) | {"reference": "uniform", "max_grad_norm": 0.0}
    run_in_two_processes(settings | {"output_dir": tmp_path / "two"})
    one = settings | {"output_dir": tmp_path / "one", "gradient_accumulation_steps": 2}
    assert iterative_dpo.main(command_line(one)) == 0
    expected, policy = (weights(tmp_path / folder / "round-2" / "policy") for folder in ("one", "two"))
    for name, tensor in expected.items():
        torch.testing.assert_close(policy[name], tensor, rtol=0, atol=2e-4)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_learn_one_reference(inputs, tmp_path):
    run_in_two_processes(inputs | {"output_dir": tmp_path / "two"})
    round_2 = tmp_path / "two" / "round-2"
    assert json.loads((round_2 / "reference.json").read_text())["fit"]["largest_relative_move"] > 0.01
    assert (round_2 / "policy" / "config.json").is_file()
    assert not (round_2 / "merge_pairs").exists()
