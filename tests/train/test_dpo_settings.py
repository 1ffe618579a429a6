"""Settings of iterative DPO: which there are, what they need, and what a folder keeps of them."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from dense_checkpoints import byte_level_tokenizer, write_dense
from training_runs import ROOT, command_line
from trl import DPOConfig

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.train.errors import RunError
from upcycled_moe.train.preference import policies, round_figures, run_state
from upcycled_moe.train.preference.dpo_arguments import (
    GROUPS,
    TRL_SETTINGS,
    PolicyArguments,
    parse_arguments,
    resolved_settings,
)
from upcycled_moe.train.preference.log_probabilities import Answer, AnswerScorer, tokenize_answers
from upcycled_moe.train.preference.round_pairs import PairSets


SETTINGS = {"model_name_or_path": "dense", "train_data": ["a.parquet"], "eval_data": ["b.parquet"], "use_cpu": True}
REWARD_MODEL = {"round_data": "on_policy", "reward_model": "rm"}


def parsed(tmp_path: Path, **settings):
    return parse_arguments(command_line(SETTINGS | {"output_dir": tmp_path / "out"} | settings))


def test_trl_has_the_settings_that_are_taken_from_it():
    names = {setting.name for setting in fields(DPOConfig)}
    assert names >= TRL_SETTINGS
    assert not TRL_SETTINGS & {setting.name for group in GROUPS for setting in fields(group)}


@pytest.mark.parametrize(
    "name",
    ["ld_alpha", "precompute_ref_batch_size", "dataset_num_proc", "eval_strategy", "hub_model_id", "bf16_full_eval"],
)
def test_what_would_do_nothing_is_no_setting(tmp_path, name):
    with pytest.raises(SettingsError, match=f"unknown key '{name}'"):
        parsed(tmp_path, **{name: 1})


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({"reference": "last", "merge_max_steps": 3}, "reference=learned"),
        ({"reference": "learned", "ema_decay": 0.5}, "reference=ema"),
        ({"samples_per_prompt": 4}, "round_data=on_policy"),
        ({"temperature": 0.7}, "round_data=on_policy"),
        ({"max_new_tokens": 4}, "round_data=on_policy or eval_samples"),
        ({"eval_reward_model": "rm"}, "eval_samples"),
        ({"merge_data": ["c.parquet"], "merge_share": 0.2}, "no merge_data"),
        ({"label_smoothing": 0.1}, "loss_type=robust, exo_pair, aot or aot_unpaired"),
        ({"max_steps": 5, "num_train_epochs": 2}, "no max_steps"),
    ],
)
def test_settings_that_need_others_say_so(tmp_path, settings, others):
    *_, name = settings
    with pytest.raises(SettingsError, match=rf"{name}=\S+ has an effect only with {others}; leave it out"):
        parsed(tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        *({"reference": reference} for reference in ("last", "uniform", "ema", "learned")),
        {"reference": "learned", "merge_data": ["c.parquet"]},
        {"loss_type": "robust", "label_smoothing": 0.1, **REWARD_MODEL},
        {"max_steps": 3, "eval_samples": 2, "eval_reward_model": "rm"},
    ],
    ids=str,
)
def test_the_settings_that_a_run_keeps_give_it_again(tmp_path, settings):
    arguments = parsed(tmp_path, **settings)
    run_state.begin_run(tmp_path / "out", arguments, 1, {})
    again = parse_arguments(["--config", str(tmp_path / "out" / "training_config.yaml")])
    assert resolved_settings(again) == resolved_settings(arguments)
    assert again[:-1] == arguments[:-1]


@pytest.mark.parametrize("reference", ["last", "uniform", "ema", "learned"])
def test_shipped_settings_are_taken_with_every_reference(tmp_path, reference):
    config = ROOT / "train" / "configs" / "iterative_dpo.yaml"
    settings = SETTINGS | {"output_dir": tmp_path, "reference": reference, "bf16": False}
    assert parse_arguments(["--config", str(config), *command_line(settings)]).rounds.reference == reference


def test_a_run_that_was_killed_as_it_began_begins_again(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("iterative_dpo.json.partial", "training_config.yaml"):
        (folder / name).write_text("{", encoding="utf-8")
    run_state.begin_run(folder, parsed(tmp_path), 1, {})
    assert json.loads((folder / "iterative_dpo.json").read_text())["settings"]["beta"] == 0.1


def test_settings_may_change_until_a_round_has_begun(tmp_path):
    run_state.begin_run(tmp_path / "out", parsed(tmp_path), 1, {})
    (tmp_path / "out" / "round-0").mkdir()
    (tmp_path / "out" / "round-0" / "eval_log_probs.parquet.partial").touch()
    run_state.begin_run(tmp_path / "out", parsed(tmp_path, beta=0.2), 1, {})
    (tmp_path / "out" / "round-0" / "eval_log_probs.parquet").touch()
    run_state.begin_run(tmp_path / "out", parsed(tmp_path, beta=0.2, save_steps=7), 1, {})
    with pytest.raises(SettingsError, match=r"holds a run with beta=0.2, not 0.1"):
        run_state.begin_run(tmp_path / "out", parsed(tmp_path), 1, {})


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return write_dense(tmp_path_factory.mktemp("start") / "dense")


def pairs_of(*questions: str) -> Dataset:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    rows = [
        {"prompt": said("user", text), "chosen": said("assistant", "a"), "rejected": said("assistant", "b")}
        for text in questions
    ]
    return Dataset.from_list([row | {"source": "test"} for row in rows])


@pytest.mark.parametrize("changed", ["train_data", "merge_data", "eval_data", "chat_template", "model_name_or_path"])
def test_a_run_does_not_go_on_with_other_input(tmp_path, dense, changed):
    arguments, tokenizer = parsed(tmp_path), byte_level_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    sets = {"rounds": [pairs_of("1"), pairs_of("2")], "merge": pairs_of("3", "4"), "evaluation": pairs_of("5")}
    start = dense

    def begin() -> None:
        inputs = run_state.input_digests(arguments, PairSets(**sets), tokenizer, start)
        run_state.begin_run(tmp_path / "out", arguments, 1, inputs)

    begin()
    (tmp_path / "out" / "round-0").mkdir()
    (tmp_path / "out" / "round-0" / "figures.json").touch()
    begin()
    if changed == "chat_template":
        tokenizer.chat_template += "\n"
    elif changed == "model_name_or_path":
        start = write_dense(tmp_path / "other", seed=1)
    else:
        # The same rows; where one round ends, and their order, count.
        sets |= {
            "train_data": {"rounds": [pairs_of("1", "2"), pairs_of("2").select([])]},
            "merge_data": {"merge": pairs_of("4", "3")},
            "eval_data": {"evaluation": pairs_of("6")},
        }[changed]
    with pytest.raises(SettingsError, match=f"what {changed} stands for has changed since"):
        begin()


def test_policies_need_the_positions_and_a_head(dense, tmp_path):
    policy, tokenizer = PolicyArguments(model_name_or_path=str(dense)), byte_level_tokenizer()
    config = json.loads((dense / "config.json").read_text())
    most = config["max_position_embeddings"]
    policies.check_policy(dense, policy, tokenizer, most)
    with pytest.raises(SettingsError, match=rf"max_length={most + 1} exceeds max_position_embeddings={most} of"):
        policies.check_policy(dense, policy, tokenizer, most + 1)
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"architectures": ["Qwen2ForSequenceClassification"]}), encoding="utf-8"
    )
    with pytest.raises(SettingsError, match=r"is no language model \(Qwen2ForSequenceClassification in config.json"):
        policies.check_policy(tmp_path, policy, tokenizer, most)


def test_a_template_that_refuses_a_conversation_is_an_error_of_settings():
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only questions') }}"
    with pytest.raises(SettingsError, match=r"refuses a conversation of user \(only questions\)"):
        tokenize_answers(pairs_of("1"), tokenizer, 48, "pairs")


def test_a_model_that_is_ruined_ends_the_run(make_dense):
    model = make_dense()
    scorer = AnswerScorer(0, 2)
    answers = [Answer([5, 6], [7]), Answer([5], [8, 9])]
    assert len(scorer(model, answers)) == 2
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(RunError, match=r"2 of 2 answers have log-probabilities that are not finite"):
        scorer(model, answers)


def test_the_error_of_an_accuracy_is_that_of_the_mean_of_its_wins():
    start = {"chosen": [0.0] * 4, "rejected": [0.0] * 4}
    ties = round_figures.pair_figures(start, start, ["a"] * 4, beta=1.0)
    assert (ties["accuracy"], ties["accuracy_error"]) == (0.5, 0.0)
    figures = round_figures.pair_figures(start | {"chosen": [1.0, 0.0, 0.0, -1.0]}, start, ["a"] * 4, beta=1.0)
    wins = torch.tensor([1.0, 0.5, 0.5, 0.0])
    assert figures["accuracy_error"] == pytest.approx(wins.std().item() / 2)
