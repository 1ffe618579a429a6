"""A whole study of a few seconds: text, tokenizer, parent, methods, analysis, report."""

import json
import re

import pytest
import stages
from plan import study_tasks, training_task
from run import main
from study_results import collect_results
from study_settings import load_study
from tasks import run_tasks, tasks_to_do

from upcycled_moe.train.arguments import build_arguments
from upcycled_moe.train.data.blocks import ResumableBlocks
from upcycled_moe.train.data.sources import training_blocks
from upcycled_moe.train.model import load_tokenizer


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What `run.py` sets for its workers, restored afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "TRANSFORMERS_VERBOSITY"):
            patch.delenv(name, raising=False)
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def config(settings, write_config):
    return write_config(settings)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


def run_study(config, data, output) -> int:
    return main([str(config), "--data", str(data), "--output", str(output)])


@pytest.mark.usefixtures("environment")
def test_study_runs_reports_and_resumes(config, settings, write_config, data, output, capfd):
    assert run_study(config, data, output) == 0
    assert "] analysis/gqa/folded/seed_2, " in capfd.readouterr().out
    results = json.loads((output / "report" / "results.json").read_text())
    methods = results["parents"]["gqa"]["methods"]
    assert list(methods) == ["dense", "vanilla", "folded"]
    for method in methods.values():
        assert [point["tokens"] for point in method["runs"]["1"]["curve"]] == [2 * 4 * 32, 4 * 4 * 32]
        assert set(method["loss"]) == {"fiction", "travel", "all"}
    # Top-2 of 4: two idle experts a layer. A folded mixture has as many parameters as a random linear router.
    idle = 2 * 3 * 32 * 32
    assert methods["vanilla"]["total_parameters"] - methods["vanilla"]["active_parameters"] == idle
    assert methods["vanilla"]["runs"]["1"]["loss"] != methods["vanilla"]["runs"]["2"]["loss"]
    assert methods["folded"]["figures"]["routing.entropy"]["mean"] > 0
    assert methods["vanilla"]["difference"]["all"] == {"mean": 0.0, "half_width": 0.0}
    report = (output / "report" / "report.md").read_text()
    assert re.search(r"^\| Folded \| .* ± ", report, re.MULTILINE)
    assert (output / "report" / "loss_gqa.png").stat().st_size > 1000
    # Trained models go once they were looked into; parents stay.
    assert not list((output / "train").rglob("*.safetensors"))
    assert list((output / "parent").rglob("model.safetensors"))

    tasks = study_tasks(load_study(config), data)
    assert tasks_to_do(tasks, output) == []
    settings["methods"]["folded"]["settings"]["router_logit_std"] = 1.0
    changed = study_tasks(load_study(write_config(settings)), data)
    assert [task.name for task in tasks_to_do(changed, output)] == [
        f"{kind}/gqa/folded/seed_{seed}" for seed in (1, 2) for kind in ("train", "analysis")
    ]
    check_same_result_in_one_worker(settings, changed, output, methods)


def check_same_result_in_one_worker(settings, tasks, output, methods):
    """Run the dense method again, alone in one process: a result does not depend on what else ran."""
    name = training_task("gqa", "dense", 2)
    (output / name / "task.json").unlink()
    wanted = [task for task in tasks if task.name == name or not task.name.startswith(("train/", "analysis/"))]
    run_tasks(wanted, output, 1, announce=lambda line: None)
    metrics = json.loads((output / name / stages.METRICS_FILE).read_text())
    losses = [entry["eval_loss"] for entry in metrics["log"] if "eval_loss" in entry]
    assert losses == [point["loss"]["all"] for point in methods["dense"]["runs"]["2"]["curve"]]


def test_wrong_settings_end_with_one_line(config, tmp_path, settings, write_config, data, capsys):
    assert run_study(config, tmp_path / "nowhere", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    settings["sedes"] = 1
    assert run_study(write_config(settings), data, tmp_path / "out") == 2
    assert "did you mean 'seeds'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
