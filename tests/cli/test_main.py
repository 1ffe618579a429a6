import argparse
import dataclasses
import importlib.metadata
import os
import subprocess
import sys

import pytest

from upcycled_moe.cli.main import build_parser
from upcycled_moe.cli.recipe_options import SECTIONS
from upcycled_moe.conversion.recipe import ConversionRecipe


RECIPE_OPTIONS = [
    "--recipe",
    "--model",
    "--revision",
    "--num-experts",
    "--num-experts-per-tok",
    "--decoder-sparse-step",
    "--mlp-only-layers",
    "--moe-layers",
    "--experts",
    "--expert-noise",
    "--drop-ratio",
    "--expert-granularity",
    "--expert-sources",
    "--backbone",
    "--shared-expert",
    "--num-zero-experts",
    "--num-copy-experts",
    "--num-constant-experts",
    "--router",
    "--num-routers",
    "--heads-per-router",
    "--head-grouping",
    "--router-pooling",
    "--key-statistic",
    "--router-logit-std",
    "--norm-topk-prob",
    "--no-norm-topk-prob",
    "--router-score-function",
    "--router-selection",
    "--num-expert-groups",
    "--router-top-p",
    "--use-router-bias",
    "--no-use-router-bias",
    "--router-bias-update-rate",
    "--router-jitter-noise",
    "--router-aux-loss-coef",
    "--router-z-loss-coef",
    "--router-entropy-loss-coef",
    "--router-locality-loss-coef",
    "--expert-nodes",
    "--calibration-data",
    "--calibration-split",
    "--calibration-text-column",
    "--calibration-tokens",
    "--calibration-block-size",
    "--calibration-batch-size",
    "--max-shard-size",
    "--seed",
]

# What scripts rely on. A change here is a change for everyone who has one.
COMMANDS = {
    "plan": [
        "DENSE",
        "OUT",
        "-h",
        "--help",
        "--json",
        "--train",
        "--accelerate",
        "--num-processes",
        "--gpu",
        "--gpu-memory",
        "--mfu",
        *RECIPE_OPTIONS,
    ],
    "convert": [
        "DENSE",
        "OUT",
        "-h",
        "--help",
        "--overwrite",
        "--dry-run",
        "--verify",
        "--push-to-hub",
        "--public",
        "--json",
        *RECIPE_OPTIONS,
    ],
    "verify": [
        "DENSE",
        "OUT",
        "-h",
        "--help",
        "--revision",
        "--trust-remote-code",
        "--dtype",
        "--tolerance",
        "--num-sequences",
        "--sequence-length",
        "--seed",
        "--json",
    ],
    "analyze": [
        "CKPT",
        "-h",
        "--help",
        "--output",
        "--overwrite",
        "--parent",
        "--json",
        "--data",
        "--domain-column",
        "--text-column",
        "--split",
        "--tokens-per-domain",
        "--block-size",
        "--batch-size",
        "--dtype",
        "--trust-remote-code",
    ],
    "evaluate": [
        "CKPT",
        "-h",
        "--help",
        "--batch-size",
        "--dtype",
        "--trust-remote-code",
        "--output",
        "--overwrite",
        "--json",
        "--tasks",
        "--offline-data",
        "--limit",
        "--perplexity-data",
        "--split",
        "--text-column",
        "--domain-column",
        "--tokens-per-domain",
        "--block-size",
    ],
    "merge": [
        "CKPT",
        "OUT",
        "-h",
        "--help",
        "--method",
        "--with",
        "--coefficients",
        "--save-coefficients",
        "--revision",
        "--max-shard-size",
        "--overwrite",
        "--dry-run",
        "--json",
        "--data",
        "--domain-column",
        "--text-column",
        "--split",
        "--tokens-per-domain",
        "--block-size",
        "--batch-size",
        "--dtype",
        "--loss",
        "--per",
        "--initial",
        "--shared-expert-weight",
        "--reference",
        "--max-pairs",
        "--learning-rate",
        "--max-steps",
        "--step-batch-size",
        "--gradient-accumulation-steps",
        "--max-length",
        "--beta",
        "--holdout",
        "--seed",
        "--gradient-checkpointing",
    ],
    "export": [
        "CKPT",
        "OUT",
        "-h",
        "--help",
        "--to",
        "--revision",
        "--max-shard-size",
        "--overwrite",
        "--dry-run",
        "--push-to-hub",
        "--public",
        "--json",
    ],
    "prune": [
        "CKPT",
        "OUT",
        "-h",
        "--help",
        "--num-experts",
        "--method",
        "--num-experts-per-tok",
        "--max-shard-size",
        "--revision",
        "--overwrite",
        "--dry-run",
        "--json",
        "--data",
        "--domain-column",
        "--text-column",
        "--split",
        "--tokens-per-domain",
        "--block-size",
        "--eval-data",
        "--eval-split",
        "--batch-size",
        "--dtype",
    ],
    "overoptimization": [
        "-h",
        "--help",
        "--samples",
        "--policy",
        "--prompts",
        "--split",
        "--max-prompts",
        "--num-samples",
        "--temperature",
        "--max-new-tokens",
        "--gold",
        "--gold-column",
        "--reward-models",
        "--ensemble",
        "--baseline",
        "--num-resamples",
        "--seed",
        "--batch-size",
        "--max-length",
        "--dtype",
        "--trust-remote-code",
        "--output",
        "--overwrite",
        "--json",
    ],
    "card": [
        "CKPT",
        "-h",
        "--help",
        "--evaluation",
        "--analysis",
        "--model-name",
        "--license",
        "--license-name",
        "--license-link",
        "--language",
        "--datasets",
        "--output",
        "--overwrite",
        "--dry-run",
        "--json",
    ],
    "push": [
        "FOLDER",
        "REPO_ID",
        "-h",
        "--help",
        "--revision",
        "--public",
        "--dry-run",
        "--json",
    ],
}


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return action.choices


def test_the_commands_are_frozen():
    assert list(subparsers()) == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_are_frozen(command):
    names = [name for action in subparsers()[command]._actions for name in action.option_strings or [action.metavar]]
    assert sorted(names) == sorted(COMMANDS[command])


def test_every_setting_of_a_recipe_is_an_option():
    names = [setting.name.replace("_", "-") for setting in dataclasses.fields(ConversionRecipe)]
    negations = [name for name in RECIPE_OPTIONS if name.startswith("--no-")]
    assert ["--recipe", *(f"--{name}" for name in names)] == [name for name in RECIPE_OPTIONS if name not in negations]
    assert negations == [
        "--no-" + setting.name.replace("_", "-")
        for setting in dataclasses.fields(ConversionRecipe)
        if setting.type is bool
    ]


def test_the_options_come_in_sections():
    """Each section begins with a setting that there is, so that none is lost when a setting is renamed."""
    names = [setting.name for setting in dataclasses.fields(ConversionRecipe)]
    assert [name for name in names if name in SECTIONS] == list(SECTIONS)
    assert names[0] in SECTIONS
    groups = {group.title: group for group in subparsers()["convert"]._action_groups}
    for title in SECTIONS.values():
        assert groups[title]._group_actions, title


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_with_its_default(upcycled_moe, command):
    status, out, err = upcycled_moe(command, "--help")
    assert (status, err) == (0, "")
    assert all(action.help for action in subparsers()[command]._actions)
    if command in ("plan", "convert"):
        text = " ".join(out.split())
        for setting in dataclasses.fields(ConversionRecipe):
            if setting.default not in (None, dataclasses.MISSING):
                assert f"(default: {setting.default})" in text, setting.name


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_goes_to_stdout(upcycled_moe, arguments):
    status, out, err = upcycled_moe(*arguments)
    assert (status, err) == (0, "")
    assert all(command in out for command in COMMANDS)
    assert "examples:" in out


def test_version(upcycled_moe):
    assert upcycled_moe("--version") == (0, f"upcycled-moe {importlib.metadata.version('upcycled-moe')}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["--version"], ["plan", "x", "--sed", "1"]])
def test_what_needs_no_model_imports_no_torch(arguments):
    code = (
        "import sys, atexit\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'rich', 'huggingface_hub'}\n"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "from upcycled_moe.cli.main import main\n"
        f"sys.exit(main({arguments!r}))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode in (0, 2)
    assert result.stderr.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plna"], "invalid choice: 'plna'"),
        (
            ["plan"],
            "the dense checkpoint is missing: there is no recipe that names one; give DENSE before OUT, or --model.",
        ),
        (["convert"], "OUT is missing; give DENSE OUT, or OUT and a recipe that names the dense checkpoint."),
        (
            ["convert", "out"],
            "the dense checkpoint is missing: there is no recipe that names one; give DENSE before OUT, or --model.",
        ),
        (
            ["convert", "dense", "out", "--model", "other"],
            "DENSE=dense and --model=other both name the dense model",
        ),
        (["convert", "dense", "out", "third"], "unknown argument third; see `upcycled-moe convert --help`."),
        (["plan", "--seed", "1", "dense", "out", "third"], "unknown argument third"),
        (["plan", "dense", "--qqq", "4"], "unknown argument --qqq"),
        (["plan", "dense", "--recipe", ""], "--recipe '': no such file, and no recipe of that name"),
        (["plan", "dense", "--use-router-bias", "false"], "unknown argument false; a switch takes no value"),
        (["convert", "dense", ""], "DENSE or OUT is empty; was it a variable that is not set?"),
        (["convert", "", "out"], "DENSE or OUT is empty; was it a variable that is not set?"),
        (["verify", "dense", "moe", "third"], "unknown argument third; see `upcycled-moe verify --help`."),
        (
            ["plan", "dense", "--recipe", "router_upcyling_8x0.5b"],
            "no recipe of that name comes with the package; did you mean router_upcycling_8x0.5b or",
        ),
        (["plan", "dense", "--recipe", "q.yaml"], "--recipe 'q.yaml': no such file, and no recipe of that name"),
        (["plan", "dense", "--recipe", "qqqqq"], "packaged recipes: attended_keys_8x0.5b, branch_train_mix, "),
        (["plan", "dense", "--num-expert", "4"], "unknown argument --num-expert; did you mean --num-experts?"),
        (["plan", "dense", "--num_experts=4"], "unknown argument --num_experts; did you mean --num-experts?"),
        (["plan", "dense", "--qqq"], "unknown argument --qqq; see `upcycled-moe plan --help`."),
        (["plan", "dense", "--num-experts", "many"], "argument --num-experts: invalid int value: 'many'"),
        (["plan", "dense", "--router", "liner"], "invalid choice: 'liner'"),
        (["verify", "dense", "moe", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(upcycled_moe, arguments, message):
    status, out, err = upcycled_moe(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert err.startswith("upcycled-moe")


def test_the_command_is_installed():
    command = os.path.join(os.path.dirname(sys.executable), "upcycled-moe")
    result = subprocess.run([command, "convert", "out"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("upcycled-moe: error: the dense checkpoint is missing")
    assert result.stderr.count("\n") == 1
