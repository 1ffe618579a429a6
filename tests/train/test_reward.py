"""Reward models from the command line: from a language model or a converted one, what a run leaves, and going on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import ROOT, command_line
from transformers import AutoConfig, Qwen2Config, Qwen2ForSequenceClassification

from upcycled_moe.cli.main import main as upcycled_moe
from upcycled_moe.common.routing_log import read_routing
from upcycled_moe.preference.scoring import load_reward_model, score_conversations
from upcycled_moe.preference.template import CHATML
from upcycled_moe.train.arguments import setting_types
from upcycled_moe.train.preference.reward_arguments import (
    GROUPS,
    TRAINER_SETTINGS,
    RewardModelArguments,
    parse_arguments,
)
from upcycled_moe.train.preference.reward_model import load_reward_start
from upcycled_moe.train.preference.reward_training_arguments import RewardTrainingArguments
from upcycled_moe.train.reward import main


def write_pairs(path: Path, num_pairs: int) -> Path:
    """Write pairs of two sources, of which the shorter answer is chosen, and one that is too long."""
    rows = [
        {"prompt": f"the {number}", "chosen": "it is", "rejected": "no it was " * (1 + number % 3), "source": source}
        for number, source in zip(range(num_pairs), ("all", "odd") * num_pairs, strict=False)
    ]
    rows.append({**rows[0], "rejected": "was " * 300})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory, dense_checkpoint) -> dict:
    folder = tmp_path_factory.mktemp("pairs")
    return {
        "model_name_or_path": dense_checkpoint,
        "chat_template": "chatml",
        "train_data": [write_pairs(folder / "train.jsonl", 16)],
        "eval_data": [write_pairs(folder / "test.jsonl", 6)],
        "max_length": 128,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_on_start": True,
        "use_cpu": True,
        "disable_tqdm": True,
    }


@pytest.fixture(scope="session")
def dense_run(inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "dense"
    assert main(command_line({**inputs, "output_dir": folder})) == 0
    return folder


@pytest.fixture(scope="session")
def converted(dense_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "moe"
    assert upcycled_moe(["convert", str(dense_run), str(folder), "--recipe", "umm_rm", "--num-experts", "4"]) == 0
    return folder


@pytest.fixture(scope="session")
def moe_settings(inputs, converted) -> dict:
    losses = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01}
    settings = {**inputs, **losses, "model_name_or_path": converted, "gradient_accumulation_steps": 2}
    del settings["chat_template"]
    return settings


@pytest.fixture(scope="session")
def moe_run(moe_settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "moe"
    assert main(command_line({**moe_settings, "output_dir": folder})) == 0
    return folder


def log_of(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


CONVERSATIONS = [
    [{"role": "user", "content": f"the {number}"}, {"role": "assistant", "content": "it " * (1 + 3 * number)}]
    for number in range(5)
]


def test_a_language_model_becomes_a_reward_model(inputs, dense_run):
    config = AutoConfig.from_pretrained(dense_run)
    assert config.architectures == ["Qwen2ForSequenceClassification"]
    assert config.num_labels == 1
    model, tokenizer = load_reward_model(str(dense_run))
    assert tokenizer.chat_template == CHATML
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    assert len(set(score_conversations(model, tokenizer, CONVERSATIONS))) == len(CONVERSATIONS)
    start = load_file(Path(inputs["model_name_or_path"], "model.safetensors"))
    trained = load_file(dense_run / "model.safetensors")
    assert "lm_head.weight" not in trained
    assert not torch.equal(start["model.layers.0.mlp.up_proj.weight"], trained["model.layers.0.mlp.up_proj.weight"])


def test_the_new_head_is_drawn_by_the_seed(dense_checkpoint):
    settings = RewardModelArguments(model_name_or_path=str(dense_checkpoint), chat_template="chatml")
    heads = [load_reward_start(settings, 128, seed)[0].score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.allclose(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(0.02, rel=0.5)


def test_the_evaluation_is_by_source_against_the_length_of_answers(dense_run):
    table = json.loads((dense_run / "reward_evaluation.json").read_text())
    assert list(table) == ["all", "sources"]
    # A source may be called as the total is.
    assert list(table["sources"]) == ["all", "odd"]
    rows = [table["all"], *table["sources"].values()]
    assert [row["pairs"] for row in rows] == [6, 3, 3]
    # The chosen answer is the shorter one throughout.
    assert {row["length_baseline"] for row in rows} == {0.0}
    assert table["all"]["accuracy"] == 1.0
    evaluations = [entry for entry in log_of(dense_run) if "eval_accuracy" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 4]
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]


def test_a_converted_reward_model_scores_as_the_dense_one(dense_run, converted):
    dense, moe = (score_conversations(*load_reward_model(str(path)), CONVERSATIONS) for path in (dense_run, converted))
    assert moe == pytest.approx(dense, abs=1e-5)


@torch.no_grad()
def test_the_converted_gate_is_that_of_xft(converted):
    """p = softmax(z); v its top-(k-1); m = max v; shared weight 1 - m; routed weights softmax(v) m."""
    model, _ = load_reward_model(str(converted), device="cpu")
    block = model.model.layers[1].mlp
    generator = torch.Generator().manual_seed(0)
    # Copies would hide a wrong weight.
    block.experts.gate_up_proj.add_(torch.randn(block.experts.gate_up_proj.shape, generator=generator) / 4)
    block.gate.weight.mul_(20)
    hidden_states = torch.randn(3, model.config.hidden_size, generator=generator)
    outputs = block(hidden_states[None])[0]
    for token, output in zip(hidden_states, outputs, strict=True):
        values, experts = torch.softmax(block.gate.weight @ token, dim=0).topk(2)
        weights = torch.softmax(values, dim=0) * values.max()
        assert (weights.sum() + (1 - values.max())).item() == pytest.approx(1.0)
        expected = (1 - values.max()) * block.shared_expert(token)
        for weight, expert in zip(weights, experts, strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
            expected = expected + weight * block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-6)


def test_the_log_has_the_routers_and_what_they_add_to_the_loss(moe_run, converted):
    steps = [entry for entry in log_of(moe_run) if "preference_loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    for entry in steps:
        added = 0.1 * entry["router/aux_loss"] + 0.01 * entry["router/z_loss"]
        assert entry["loss"] - entry["preference_loss"] == pytest.approx(added, abs=1e-6)
        assert entry["router/experts_per_token"] == 2
    routing = list(read_routing(moe_run / "routing.jsonl"))
    assert [line["step"] for line in routing] == [1, 2, 3, 4]
    assert [len(layer["load"]) for layer in routing[0]["layers"].values()] == [4, 4]
    before, after = (load_file(folder / "model.safetensors") for folder in (converted, moe_run))
    assert all(not torch.equal(before[name], after[name]) for name in before if "mlp." in name)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(moe_settings, moe_run, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(moe_run / "checkpoint-2", resumed / "checkpoint-2")
    settings = {**moe_settings, "output_dir": resumed, "resume_from_checkpoint": "last"}
    assert main(command_line(settings)) == 0

    weights, expected = (load_file(folder / "model.safetensors") for folder in (resumed, moe_run))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert main(command_line(settings)) == 2


def test_the_card_and_the_provenance_tell_of_pairs(moe_run):
    card = (moe_run / "README.md").read_text()
    [step] = [
        step for step in json.loads((moe_run / "upcycling.json").read_text())["steps"] if step["command"] == "train"
    ]
    assert step["objective"] == "bradley_terry"
    recorded = {"pairs": 16, "pairs_too_long": 1, "epochs": 1.0, "max_length": 128, "flip_rate": 0.0}
    assert step | recorded == step
    assert step["preference"]["all"]["pairs"] == 6
    assert step["tokens"] is None
    assert "AutoModelForSequenceClassification" in card
    assert "apply_chat_template" in card
    assert "**train** for 4 steps, 1 epoch of 16 preference pairs, on `train.jsonl`" in card
    assert "| all | 3 |" in card
    assert "| all pairs | 6 |" in card
    assert "nats a token" not in card
    checkpoint_card = (moe_run / "checkpoint-2" / "README.md").read_text()
    assert "**train** for 2 steps, 0.5 epochs of 16 preference pairs" in checkpoint_card


def test_label_noise_flips_pairs_to_train_on_only(inputs, dense_run, tmp_path):
    settings = {**inputs, "output_dir": tmp_path / "run", "flip_rate": 1.0, "max_steps": 6}
    assert main(command_line(settings)) == 0
    assert json.loads((tmp_path / "run" / "reward_evaluation.json").read_text())["all"]["accuracy"] == 0.0
    assert "with the answers of 100.0% of them exchanged (label noise)" in (tmp_path / "run" / "README.md").read_text()


BAD = {
    "unknown": ({"flip_rat": 0.1}, "flip_rate"),
    "range": ({"flip_rate": 2}, "flip_rate=2 is outside [0, 1]"),
    "template": ({"chat_template": ""}, "no chat template"),
    "data": ({"train_data": ["gone.parquet"]}, "gone.parquet: no such file or folder"),
    "length": ({"max_length": 9999}, "max_length=9999 exceeds max_position_embeddings"),
    "too short": ({"max_length": 4}, "pairs are longer than max_length=4"),
    "evaluation": ({"eval_data": [], "eval_strategy": "epoch"}, "needs eval_data, which is missing"),
    "no effect": (
        {"label_smoothing_factor": 0.1},
        "label_smoothing_factor is no setting of a reward model's training",
    ),
    "sampling": ({"train_sampling_strategy": "group_by_length"}, "choose one of random, sequential"),
    "no batch": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 32},
        "16 pairs make no batch of per_device_train_batch_size=32 on each of 1 processes",
    ),
    "loss": ({"router_aux_loss_coef": 0.1}, "is a qwen2 model without it"),
}


@pytest.mark.parametrize("kind", BAD)
def test_wrong_settings_end_with_2_and_one_line(kind, inputs, tmp_path, capsys):
    changed, said = BAD[kind]
    settings = {**inputs, "output_dir": tmp_path / "out", **changed}
    settings = {name: value for name, value in settings.items() if value not in ("", [])}

    assert main(command_line(settings)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("reward.py: ")
    assert said in last
    assert not (tmp_path / "out").exists()


def test_the_shipped_settings_say_what_to_give_on_a_cpu(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("upcycled_moe.train.preference.reward_training_arguments.has_bfloat16", lambda: False)
    config = ROOT / "train" / "configs" / "reward.yaml"
    given = [f"{name}={inputs[name]}" for name in ("model_name_or_path", "chat_template")]
    given += [f"train_data={inputs['train_data'][0]}", f"output_dir={tmp_path / 'out'}"]

    assert main(["--config", str(config), *given]) == 2
    assert "give use_cpu=true bf16=false to train on a CPU" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["file", "earlier run"])
def test_the_output_folder_is_looked_at_before_anything_is_loaded(kind, inputs, tmp_path, capsys):
    settings = {**inputs, "model_name_or_path": tmp_path / "gone", "output_dir": tmp_path / "out"}
    if kind == "file":
        (tmp_path / "out").touch()
        settings["output_dir"] = tmp_path / "out" / "run"
    else:
        (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
        (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").touch()
    said = {"file": "is a file; give a folder", "earlier run": "holds checkpoint-2 of an earlier run"}[kind]

    assert main(command_line(settings)) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("is_saved", [False, True])
def test_an_interrupted_run_says_how_to_go_on(is_saved, inputs, moe_run, tmp_path, monkeypatch, capsys):
    def interrupt(arguments):
        if is_saved:
            shutil.copytree(moe_run / "checkpoint-2", tmp_path / "out" / "checkpoint-2")
        raise KeyboardInterrupt

    monkeypatch.setattr("upcycled_moe.train.reward.train", interrupt)
    assert main(command_line({**inputs, "output_dir": tmp_path / "out"})) == 130
    said = "with resume_from_checkpoint=last" if is_saved else "start again with the same command"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pairs", "drop_last", "accumulation", "expected"), [(5, False, 1, 3), (5, True, 1, 2), (5, True, 4, 1)]
)
def test_steps_are_counted_as_the_trainer_makes_batches(pairs, drop_last, accumulation, expected, tmp_path):
    args = RewardTrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=2,
        dataloader_drop_last=drop_last,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
    )
    args.set_num_steps(pairs)
    assert (args.steps_per_epoch(pairs), args.max_steps) == (expected, 2 * expected)


def test_scores_are_not_rounded_by_mixed_precision(dense_run):
    settings = RewardModelArguments(model_name_or_path=str(dense_run))
    model, _ = load_reward_start(settings, 128, 0)
    hidden = []
    model.score.register_forward_pre_hook(lambda head, args: hidden.append(args[0]))
    tokens = torch.arange(12).view(1, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(input_ids=tokens).logits[:, 0]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, model.score.weight[0] @ hidden[0][:, -1].float().T, rtol=1e-6, atol=1e-7)
    scores.sum().backward()
    assert model.score.weight.grad.abs().sum() > 0


def test_every_setting_that_is_accepted_is_a_field_of_the_trainer():
    known = setting_types((RewardTrainingArguments,)).keys()
    assert known >= TRAINER_SETTINGS
    assert not TRAINER_SETTINGS & setting_types(GROUPS).keys()


def test_a_classifier_of_several_labels_is_refused(inputs, dense_checkpoint, tmp_path, capsys):
    config = Qwen2Config.from_pretrained(dense_checkpoint, num_labels=3)
    Qwen2ForSequenceClassification(config).save_pretrained(tmp_path / "three")
    settings = {**inputs, "model_name_or_path": tmp_path / "three", "output_dir": tmp_path / "out"}
    assert main(command_line(settings)) == 2
    assert "num_labels=3, but a reward model has num_labels=1" in capsys.readouterr().err


def test_shipped_settings_are_known(inputs, tmp_path):
    config = ROOT / "train" / "configs" / "reward.yaml"
    given = ["model_name_or_path=m", f"output_dir={tmp_path}", "train_data=t", "eval_data=e", "bf16=false"]
    assert parse_arguments(["--config", str(config), *given]).training.eval_strategy == "steps"


def test_help_needs_neither_torch_nor_trl(warm_python):
    code = (
        "import sys; sys.modules['trl'] = None; before = set(sys.modules)\n"
        "from upcycled_moe.train.reward import main\n"
        "status = main(['--help']); assert 'upcycled_moe.train.model' not in sys.modules; sys.exit(status)"
    )
    result = warm_python.run(code)
    assert result.returncode == 0, result.stderr
    assert "flip_rate" in result.stdout


def test_a_missing_trl_is_one_line(warm_python):
    code = (
        "import sys; sys.modules['trl'] = None\nfrom upcycled_moe.train.reward import main\n"
        "sys.exit(main(['model_name_or_path=m']))"
    )
    result = warm_python.run(code)
    assert result.returncode == 2
    assert "needs trl" in result.stderr
    assert "upcycled-moe[preference]" in result.stderr
    assert "Traceback" not in result.stderr
