"""Settings are strict, and later ones win."""

import importlib.util
import subprocess
import sys
import time

import pytest
import yaml
from training_runs import ROOT, TRAIN_SCRIPT, command_line

from upcycled_moe.common.settings import SettingsError
from upcycled_moe.train.arguments import parse_arguments, parse_command_line, resolved_settings
from upcycled_moe.train.training_arguments import UpcyclingTrainingArguments


# The least of each.
SIZES = {
    "block_size": 2,
    "max_eval_blocks": 1,
    "preprocessing_num_workers": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "tokens_per_step": 1,
    "expert_parallel_size": 1,
}
REQUIRED = ["model_name_or_path=m", "output_dir=o", "train_data=t", "max_steps=10", "use_cpu=true", "report_to=none"]


def test_command_line_forms_mean_the_same():
    configs, settings = parse_command_line(
        [
            "--config",
            "a.yaml",
            "lr=1e-4",
            "--block-size",
            "64",
            "--dtype=float32",
            "--use_cpu",
            "--train_data",
            "a",
            "b",
        ]
    )
    assert configs == ["a.yaml"]
    assert settings == {"lr": 1e-4, "block_size": 64, "dtype": "float32", "use_cpu": True, "train_data": ["a", "b"]}


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("block_size: 64\nlearning_rate: 1e-3\n")

    arguments = parse_arguments([*REQUIRED, "--config", str(config), "learning_rate=2e-3"])
    assert arguments.data.block_size == 64
    assert arguments.training.learning_rate == 2e-3
    assert arguments.training.adam_beta2 == 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["learning_rat=1"], "command line: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        (["learning_rate=fast"], "learning_rate='fast' has the wrong type; expected float."),
        (["block_size=1.5"], "block_size=1.5 has the wrong type; expected int."),
        (["bf16=1"], "bf16=1 has the wrong type; expected bool."),
        (["dtype=float8"], "expected one of 'auto', 'float32', 'bfloat16', 'float16'."),
        (["eval_strategy=steps", "eval_steps=5"], "eval_strategy=steps asks for evaluation, but eval_data is missing"),
        (["eval_on_start=true"], "eval_on_start=True asks for evaluation, but eval_data is missing"),
        (
            ["warmup_steps=9"],
            "warmup_steps=9: the warm-up takes 9 steps, but with max_steps=10 the learning rate decays from",
        ),
        (
            ["router_warmup_steps=5", "warmup_steps=4"],
            "router_warmup_steps=5 and warmup_steps=4: the warm-up takes 9",
        ),
        (
            ["router_warmup_steps=2", "lr_scheduler_type=cosine", "lr_decay_points=[]"],
            "router_warmup_steps=2 needs lr_scheduler_type='constant_with_warmup', not 'cosine'",
        ),
        (["router_learning_rate=-1"], "router_learning_rate=-1 is negative; give 0 or more."),
        (["eval_strategy=sometimes", "eval_data=t"], "sometimes is not a valid IntervalStrategy"),
        (["lr_scheduler_type=cosine", "lr_decay_points=[0.5]"], "set lr_decay_points=[]."),
        (
            ["router_warmup_steps=11", "lr_decay_points=[]"],
            "with max_steps=10 the run ends before",
        ),
        (["learning_rate=-1"], "learning_rate=-1 is negative; give 0 or more."),
        (["label_smoothing_factor=0.1"], "label_smoothing_factor=0.1: the models compute their loss themselves"),
        (["fp16=true", "use_cpu=true"], "fp16=true has no effect on a CPU"),
        (["lr_decay_points=[80]"], "lr_decay_points holds [80.0]"),
        (["expected_processes=2"], "expected_processes=2, but 1 started"),
        (["dataloader_num_workers=2"], "dataloader_num_workers=2: each worker would read all of the text"),
        (["max_steps=5", "max_steps=6"], "max_steps is given twice"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["stray"], "'stray': expected key=value."),
        *(([f"{name}={least - 1}"], f"{name}={least - 1} must be at least {least}.") for name, least in SIZES.items()),
        (["loss_chunk_tokens=-1"], "loss_chunk_tokens=-1 is negative; give 0 or more."),
    ],
)
def test_wrong_settings_are_one_clear_line(arguments, message):
    names = {argument.partition("=")[0] for argument in arguments}
    required = [argument for argument in REQUIRED if argument.partition("=")[0] not in names]
    with pytest.raises(SettingsError) as error:
        parse_arguments([*required, *arguments])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["model_name_or_path", "output_dir", "train_data", "max_steps"])
def test_what_has_no_default_must_be_given(missing):
    with pytest.raises(SettingsError, match=f"{missing} is missing"):
        parse_arguments([argument for argument in REQUIRED if not argument.startswith(missing)])


def test_no_is_a_word_and_not_a_truth_value():
    assert parse_arguments([*REQUIRED, "save_strategy=no"]).training.save_strategy == "no"


def test_null_stands_for_no_limit():
    assert parse_arguments([*REQUIRED, "max_eval_blocks=null"]).data.max_eval_blocks is None


def test_only_the_schedule_of_the_recipe_steps_down_by_default():
    assert parse_arguments(REQUIRED).training.lr_decay_points == [0.8, 0.9]
    assert parse_arguments([*REQUIRED, "lr_scheduler_type=cosine"]).training.lr_decay_points == []


def test_arguments_made_by_hand_have_defaults_too(tmp_path):
    arguments = UpcyclingTrainingArguments(output_dir=str(tmp_path), max_steps=100, use_cpu=True)
    assert arguments.eval_strategy == "no"
    assert arguments.report_to == []


def test_tokens_per_step_sets_the_accumulation():
    arguments = parse_arguments([*REQUIRED, "tokens_per_step=1024", "block_size=64", "per_device_train_batch_size=2"])
    arguments.training.set_tokens_per_step(arguments.data.block_size)
    assert arguments.training.gradient_accumulation_steps == 8

    arguments = parse_arguments([*REQUIRED, "tokens_per_step=1000", "block_size=64"])
    with pytest.raises(SettingsError, match="tokens_per_step=1000 is not a multiple of 64"):
        arguments.training.set_tokens_per_step(arguments.data.block_size)

    arguments = parse_arguments([*REQUIRED, "tokens_per_step=1024", "block_size=64", "gradient_accumulation_steps=2"])
    with pytest.raises(SettingsError, match="gradient_accumulation_steps=2 say the same thing"):
        arguments.training.set_tokens_per_step(arguments.data.block_size)


def test_resolved_settings_are_a_config_file_of_the_same_run(tmp_path):
    arguments = parse_arguments([*REQUIRED, "lr_decay_points=[0.5]", "save_steps=7"])
    config = tmp_path / "resolved.yaml"
    config.write_text(yaml.safe_dump(resolved_settings(arguments)))

    again = parse_arguments(["--config", str(config)])
    assert (again.model, again.data) == (arguments.model, arguments.data)
    assert again.training.to_dict() == arguments.training.to_dict()


@pytest.mark.parametrize("is_installed", [True, False])
def test_tensorboard_is_the_default_where_it_is_installed(monkeypatch, is_installed):
    find_spec = importlib.util.find_spec

    def find_spec_but_tensorboard(name, *args):
        return (True if is_installed else None) if name == "tensorboard" else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec_but_tensorboard)
    required = [argument for argument in REQUIRED if not argument.startswith("report_to")]
    arguments = parse_arguments(required)
    assert arguments.training.report_to == (["tensorboard"] if is_installed else [])
    assert [note.startswith("TensorBoard is not installed") for note in arguments.notes] == [True] * (not is_installed)
    if not is_installed:
        with pytest.raises(SettingsError, match="report_to='tensorboard', but TensorBoard is not installed"):
            parse_arguments([*required, "report_to=tensorboard"])


def test_evaluation_follows_the_text_for_it():
    def strategy(*arguments):
        return parse_arguments([*REQUIRED, *arguments]).training.eval_strategy

    assert strategy("eval_data=t", "eval_steps=5") == "steps"
    assert strategy("eval_data=t") == "no"
    assert strategy("eval_data=t", "eval_steps=5", "eval_strategy=no") == "no"
    assert strategy("eval_steps=5") == "no"
    assert parse_arguments([*REQUIRED, "eval_steps=5"]).notes == ["eval_data is not given; nothing is evaluated."]


# Those of other scripts are tested with them.
CONFIGS = sorted(
    path for path in (ROOT / "train" / "configs").glob("*.yaml") if path.stem not in ("reward", "iterative_dpo")
)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_have_known_keys_and_types(config):
    overrides = [argument for argument in REQUIRED if not argument.startswith("max_steps")]
    assert parse_arguments(["--config", str(config), *overrides, "bf16=false"]).training.max_steps > 0


def test_help_does_not_wait_for_torch():
    start = time.perf_counter()
    result = subprocess.run([sys.executable, str(TRAIN_SCRIPT), "--help"], capture_output=True, text=True)

    assert result.returncode == 0
    assert "learning_rate" in result.stdout
    assert time.perf_counter() - start < 2


def test_the_script_ends_with_2_and_one_line(warm_python, settings, moe_checkpoint, tmp_path):
    settings |= {"model_name_or_path": moe_checkpoint, "output_dir": tmp_path / "out", "train_data": ["gone.parquet"]}
    script = f"import runpy; runpy.run_path({str(TRAIN_SCRIPT)!r}, run_name='__main__')"
    result = warm_python.run(script, *command_line(settings))

    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("train.py: gone.parquet: no such file or folder")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
