"""A whole study of a few seconds: text, tokenizer, parent, methods, analysis, report."""

import fcntl
import json
import math
import re
import shutil
from itertools import accumulate

import pytest
import stages
import study_report
import torch
import yaml
from plan import study_tasks, training_task
from run import main
from study_settings import load_study
from tasks import LOCK_FILE, run_tasks, tasks_to_do
from transformers import AutoModelForCausalLM, AutoTokenizer

from upcycled_moe.train.arguments import build_arguments


TEXT_FILES = (stages.PARENT_FILE, stages.UPCYCLING_FILE, stages.VALIDATION_FILE)


def run_study(config, data, output) -> int:
    # One worker, which imports torch once; the test below runs a task in another.
    return main([str(config), "--data", str(data), "--output", str(output), "--num-workers", "1"])


@pytest.fixture(scope="module")
def output(study_template, data, tmp_path_factory):
    """The folder of the finished study."""
    folder = tmp_path_factory.mktemp("study")
    config = folder / "study.yaml"
    config.write_text(yaml.safe_dump(study_template, sort_keys=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        # Set by the run for its workers, and put back afterwards.
        for name in (
            *("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE"),
            "TRANSFORMERS_VERBOSITY",
        ):
            patch.setenv(name, "")
        assert run_study(config, data, folder / "out") == 0
    return folder / "out"


@pytest.fixture
def tasks_of(write_config, data):
    """The tasks of a study with these settings."""
    return lambda settings: study_tasks(load_study(write_config(settings)), data)


@pytest.fixture
def methods(output) -> dict:
    return json.loads((output / "report" / "results.json").read_text())["parents"]["gqa"]["methods"]


def test_every_method_has_its_runs_and_intervals(methods):
    assert list(methods) == ["dense", "vanilla", "folded"]
    for method in methods.values():
        assert [point["tokens"] for point in method["runs"]["1"]["curve"]] == [0, 2 * 4 * 32, 4 * 4 * 32]
        assert set(method["loss"]) == {"fiction", "travel", "all"}
    assert methods["vanilla"]["runs"]["1"]["loss"] != methods["vanilla"]["runs"]["2"]["loss"]
    assert methods["vanilla"]["difference"]["all"] == {"mean": 0.0, "half_width": 0.0}
    assert methods["folded"]["difference"]["all"]["half_width"] > 0


def test_methods_are_compared_with_each_other_too(output, methods):
    (pair,) = json.loads((output / "report" / "results.json").read_text())["parents"]["gqa"]["comparisons"]
    assert (pair["first"], pair["second"]) == ("folded", "dense")
    folded, dense = (methods[name]["loss"]["all"]["mean"] for name in ("folded", "dense"))
    assert pair["difference"]["all"]["mean"] == pytest.approx(folded - dense, abs=2e-6)


def test_parameters_and_figures_are_those_of_the_model(methods):
    # One layer, two of four experts idle, three matrices of 32 by 32 each.
    vanilla = methods["vanilla"]
    assert vanilla["total_parameters"] - vanilla["active_parameters"] == 2 * 3 * 32 * 32
    assert methods["dense"]["active_parameters"] == methods["dense"]["total_parameters"]
    assert 0 < vanilla["figures"]["routing.entropy"]["mean"] <= 1.387  # ln 4
    assert methods["dense"]["figures"] == {}


def test_primary_comparisons_are_corrected_and_say_what_is_undecided(output):
    found = json.loads((output / "report" / "results.json").read_text())["parents"]["gqa"]
    (pair,) = found["primary_comparisons"]
    first, second = (
        [run["loss"]["all"] for run in found["methods"][name]["runs"].values()] for name in ("folded", "vanilla")
    )
    # Two pairs: the t distribution of one degree of freedom is Cauchy's.
    one, two = (a - b for a, b in zip(first, second, strict=True))
    expected = 1 - 2 / math.pi * math.atan(abs(one + two) / abs(one - two))
    # Losses in the file are rounded.
    assert pair["corrected_p_value"] == pair["p_value"] == pytest.approx(expected, abs=0.05)
    report = (output / "report" / "report.md").read_text()
    assert re.search(r"^\| Folded \| Vanilla \| `gqa` \| .* \| undecided \|$", report, re.MULTILINE)


def test_upcycled_models_start_from_the_function_of_the_parent(methods):
    starts = [methods[name]["runs"]["1"]["curve"][0]["loss"]["all"] for name in ("dense", "vanilla", "folded")]
    assert starts == pytest.approx(starts[:1] * 3, abs=1e-4)


def test_folded_routers_give_the_same_logits(output, settings, tasks_of, tmp_path):
    (task,) = [task for task in tasks_of(settings) if task.name == training_task("gqa", "folded", 1)]
    parent, text = output / "parent" / "gqa" / stages.MODEL_FOLDER, output / "text" / stages.PARENT_FILE
    outputs = []
    for folds in (False, True):
        start = stages._upcycle({**task.settings, "fold_routers": folds}, parent, text, tmp_path / str(folds))
        model = AutoModelForCausalLM.from_pretrained(start)
        assert (model.config.router_type == "linear") == folds
        with torch.no_grad():
            outputs.append(model(torch.arange(32)[None] * 7, output_router_logits=True))
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    torch.testing.assert_close(outputs[0].router_logits, outputs[1].router_logits)


def test_runs_on_other_blocks_are_not_compared_and_the_report_stays(
    output, settings, write_config, data, tmp_path, capsys
):
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    metrics = copy / training_task("gqa", "folded", 2) / stages.METRICS_FILE
    metrics.write_text(metrics.read_text().replace('"blocks_digest": "', '"blocks_digest": "other'))
    before = (copy / "report" / "results.json").read_bytes()
    assert run_study(write_config(settings), data, copy) == 1
    assert "seed 2: 'dense' and 'folded' were not trained and evaluated on the same blocks" in capsys.readouterr().err
    assert (copy / "report" / "results.json").read_bytes() == before


def test_a_report_is_written_whole_or_not_at_all(output, settings, write_config, data, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    before = (copy / "report" / "results.json").read_bytes()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(study_report, "draw_losses", fail)
    settings["title"] = "Another title"
    assert run_study(write_config(settings), data, copy) == 1
    assert "No space left" in capsys.readouterr().err
    assert (copy / "report" / "results.json").read_bytes() == before
    assert not list(copy.glob("*.partial"))


def test_an_output_is_written_by_one_command_at_a_time(output, settings, write_config, data, capsys):
    with (output / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_study(write_config(settings), data, output) == 1
    assert "another study is written there" in capsys.readouterr().err


def test_report_has_a_row_a_method_and_pictures(output):
    report = (output / "report" / "report.md").read_text()
    assert re.search(r"^\| Folded \|.* \d\.\d{4} ± \d\.\d{4} \|.*[+-]\d\.\d{4} ± ", report, re.MULTILINE)
    assert (output / "report" / "loss_gqa.png").read_bytes().startswith(b"\x89PNG")
    assert "](loss_gqa.png)" in report


def test_trained_models_go_and_parents_stay(output):
    assert not list((output / "train").rglob(stages.MODEL_FOLDER))
    assert (output / "parent" / "gqa" / stages.WEIGHTS_FILE).exists()


def test_a_finished_study_has_nothing_to_do_and_a_changed_method_only_its_own_runs(output, settings, tasks_of):
    assert tasks_to_do(tasks_of(settings), output) == []
    settings["methods"]["folded"]["settings"]["router_logit_std"] = 1.0
    assert [task.name for task in tasks_to_do(tasks_of(settings), output)] == [
        f"{kind}/gqa/folded/seed_{seed}" for seed in (1, 2) for kind in ("train", "analysis")
    ]


def test_text_is_mixed_and_calibration_sees_every_domain(output, settings):
    tokenizer = AutoTokenizer.from_pretrained(output / "tokenizer")
    passages = [json.loads(line) for line in (output / "text" / stages.PARENT_FILE).open(encoding="utf-8")]
    lengths = [len(tokenizer(passage["text"])["input_ids"]) for passage in passages]
    seen = [
        passage["domain"]
        for passage, before in zip(passages, accumulate([0, *lengths]), strict=False)
        if before < settings["recipe"]["calibration_tokens"]
    ]
    assert set(seen) == {"fiction", "travel"}
    for name in TEXT_FILES:
        characters = {"fiction": 0, "travel": 0}
        for line in (output / "text" / name).open(encoding="utf-8"):
            passage = json.loads(line)
            characters[passage["domain"]] += len(passage["text"])
            assert abs(characters["fiction"] - characters["travel"]) <= settings["text"]["passage_characters"]


def test_no_passage_is_in_two_files(output):
    files = [(output / "text" / name).read_text("utf-8").splitlines() for name in TEXT_FILES]
    assert len({line for lines in files for line in lines}) == sum(map(len, files))


def test_routers_are_calibrated_on_the_text_of_the_parents(tasks_of, settings):
    (task,) = [task for task in tasks_of(settings) if task.name == training_task("gqa", "folded", 1)]
    assert task.settings["recipe"]["calibration_data"] == [stages.PARENT_FILE]


def test_methods_of_one_seed_see_the_same_blocks_in_the_same_order(output):
    digests = {
        (method, seed): json.loads((output / training_task("gqa", method, seed) / stages.METRICS_FILE).read_text())[
            "blocks_digest"
        ]
        for method in ("dense", "vanilla", "folded")
        for seed in (1, 2)
    }
    for seed in (1, 2):
        assert len({digests[method, seed] for method in ("dense", "vanilla", "folded")}) == 1
    assert digests["vanilla", 1] != digests["vanilla", 2]


def test_digest_tells_order_and_evaluation(output, settings, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(output / "cache"))
    files = [output / "text" / name for name in (stages.UPCYCLING_FILE, stages.VALIDATION_FILE)]
    start = output / "parent" / "gqa" / stages.MODEL_FOLDER

    def digest(seed: int = 1, **change) -> str:
        run = stages.training_settings({**settings["training"], **change}, start, *files, seed, output / "x")
        return stages.blocks_digest(build_arguments(run))

    assert digest() == digest(learning_rate=1e-2)
    digests = [digest(), digest(seed=2), digest(max_steps=6), digest(block_size=16), digest(max_eval_blocks=1)]
    assert len(set(digests)) == len(digests)


@pytest.mark.slow
def test_a_run_does_not_depend_on_what_ran_before(output, settings, tasks_of, methods):
    name = training_task("gqa", "folded", 2)
    tasks = [
        task
        for task in tasks_of(settings)
        if task.name == name or task.name.split("/")[0] not in ("train", "analysis")
    ]
    shutil.rmtree(output / name)
    run_tasks(tasks, output, 1, keep_bulky=True, announce=lambda line: None)
    metrics = json.loads((output / name / stages.METRICS_FILE).read_text())
    losses = [entry["eval_loss"] for entry in metrics["log"] if "eval_loss" in entry]
    assert losses == pytest.approx(
        [point["loss"]["all"] for point in methods["folded"]["runs"]["2"]["curve"]], abs=1e-6
    )


def test_wrong_settings_end_with_one_line(settings, write_config, tmp_path, data, capsys):
    assert run_study(write_config(settings), tmp_path / "nowhere", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    settings["sedes"] = 1
    assert run_study(write_config(settings), data, tmp_path / "out") == 2
    assert "did you mean 'seeds'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
