import json
import math
import re
import subprocess
import sys

import pytest
from dense_checkpoints import write_dense

from upcycled_moe.cli.evaluation_tables import _difference
from upcycled_moe.common.checkpoints import load_model
from upcycled_moe.evaluation.results import EvaluationReport, Score


@pytest.fixture
def no_harness(monkeypatch):
    """A machine where lm-evaluation-harness is not installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def evaluate_text(upcycled_moe, checkpoints, text_file, *options):
    """Evaluate a checkpoint or several, in perplexity."""
    checkpoints = checkpoints if isinstance(checkpoints, tuple) else (checkpoints,)
    return upcycled_moe("evaluate", *checkpoints, "--perplexity-data", text_file, "--tokens-per-domain", 300, *options)


def rows_of(out, domain="sample"):
    return [line for line in out.splitlines() if line.startswith(domain)]


def test_tables_of_perplexity_and_of_differences(upcycled_moe, dense, text_file, tmp_path):
    other = write_dense(tmp_path / "other", seed=1)
    names = (f"one={dense}", f"two={dense}", f"three={other}")
    status, out, err = evaluate_text(upcycled_moe, names, text_file)
    assert (status, err) == (0, "")
    assert out.splitlines()[1].split() == ["Domain", "Tokens", "one", "two", "three"]
    losses, differences = rows_of(out)
    assert losses.count("±") == 3
    bits = [float(cell.split()[0]) for cell in losses.split(", ")[1:]]
    same, different = re.findall(r"([+-]\d+\.\d+) ± (\d+\.\d+)(\*?)", differences)
    assert same == ("+0.000", "0.000", "")
    assert float(different[0]) == pytest.approx(bits[2] - bits[0], abs=0.0011)
    assert (different[2] == "*") == (abs(float(different[0])) > 2 * float(different[1]))


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (Score(0.021, 0.01), "+2.1 ± 1.0*"),
        (Score(-0.021, 0.01), "-2.1 ± 1.0*"),
        (Score(0.019, 0.01), "+1.9 ± 1.0 "),
        (Score(0.0, 0.0), "+0.0 ± 0.0 "),
        (Score(0.5, None), "+50.0 "),
        (None, "-"),
    ],
)
def test_a_mark_stands_where_chance_hardly_gets(score, shown):
    assert _difference(score, 100, 1) == shown


def test_long_names_are_numbered(upcycled_moe, dense, text_file):
    names = ("a-checkpoint-of-a-long-name", "b")
    _, out, _ = evaluate_text(upcycled_moe, tuple(f"{name}={dense}" for name in names), text_file)
    assert out.splitlines()[1].split() == ["Domain", "Tokens", "#1", "#2"]
    assert {f"#1: {names[0]}", "#2: b"} <= set(out.splitlines())


def test_a_domain_without_bytes_has_a_dash(upcycled_moe, dense, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("upcycled_moe.common.perplexity.target_bytes", lambda *_: 0)
    status, out, _ = evaluate_text(
        upcycled_moe, (f"one={dense}", f"two={dense}"), text_file, "--output", tmp_path / "out"
    )
    assert status == 0
    losses, differences = rows_of(out)
    assert losses.count(", -") == 2
    assert differences.split()[-1] == "-"
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["checkpoints"][0]["domains"]["sample"]["bits_per_byte"] is None


def cut_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def test_what_breaks_a_later_checkpoint_loses_no_earlier_one(upcycled_moe, dense, text_file, tmp_path):
    broken = write_dense(tmp_path / "broken")
    cut_weights(broken)
    out_folder = tmp_path / "out"
    status, out, err = evaluate_text(upcycled_moe, (f"one={dense}", broken), text_file, "--output", out_folder)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{broken}: cannot be loaded" in err
    assert len(rows_of(out)) == 1
    assert "Incomplete: broken not evaluated." in out
    content = json.loads((out_folder / "results.json").read_text())
    assert content["complete"] is False
    assert [checkpoint["name"] for checkpoint in content["checkpoints"]] == ["one"]


def test_an_interruption_loses_no_finished_checkpoint(upcycled_moe, dense, text_file, monkeypatch):
    loaded = []

    def load_once(*arguments, **options):
        if loaded:
            raise KeyboardInterrupt
        loaded.append(arguments)
        return load_model(*arguments, **options)

    monkeypatch.setattr("upcycled_moe.evaluation.evaluate.load_model", load_once)
    status, out, err = evaluate_text(upcycled_moe, (f"one={dense}", f"two={dense}"), text_file, "--json")
    assert (status, err) == (130, "upcycled-moe: error: interrupted.\n")
    assert [checkpoint["name"] for checkpoint in json.loads(out)["checkpoints"]] == ["one"]


def test_a_full_disk_loses_no_table(upcycled_moe, dense, text_file, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("upcycled_moe.cli.evaluate.staged", fail)
    status, out, err = evaluate_text(upcycled_moe, dense, text_file, "--output", tmp_path / "out")
    assert (status, err) == (1, "upcycled-moe: error: No space left on device\n")
    assert len(rows_of(out)) == 1


def test_what_is_wrong_with_a_later_checkpoint_is_found_before_the_first_is_read(
    upcycled_moe, dense, text_file, tmp_path, monkeypatch
):
    odd = write_dense(tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    monkeypatch.setattr(
        "upcycled_moe.evaluation.evaluate.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    (odd / "config.json").write_text(json.dumps(config | {"hidden_act": "nonsense"}))
    status, out, err = evaluate_text(upcycled_moe, (f"one={dense}", odd), text_file)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "nonsense" in err


def test_a_model_that_gives_no_numbers_is_refused(upcycled_moe, text_file, tmp_path):
    folder = write_dense(tmp_path / "nan", rms_norm_eps=math.nan)
    status, out, err = evaluate_text(upcycled_moe, folder, text_file)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "nan: its loss on domain 'sample' is not finite" in err


def test_json_is_what_the_output_folder_holds(upcycled_moe, dense, text_file, tmp_path):
    out_folder = tmp_path / "results"
    status, out, _ = evaluate_text(upcycled_moe, dense, text_file, "--json", "--output", out_folder)
    assert status == 0
    content = json.loads(out)
    assert content == json.loads((out_folder / "results.json").read_text())
    assert set(content) == set(EvaluationReport.__dataclass_fields__)
    assert [path.name for path in out_folder.iterdir()] == ["results.json"]


def test_results_are_replaced_with_leave_only(upcycled_moe, dense, text_file, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    status, out, err = evaluate_text(upcycled_moe, dense, text_file, "--output", tmp_path)
    assert (status, out) == (2, "")
    assert "exists and is not empty; give another folder, or --overwrite" in err
    assert evaluate_text(upcycled_moe, dense, text_file, "--output", tmp_path, "--overwrite")[0] == 0
    assert json.loads((tmp_path / "results.json").read_text())["checkpoints"]


def test_a_checkpoint_is_never_replaced(upcycled_moe, dense, text_file):
    status, _, err = evaluate_text(upcycled_moe, dense, text_file, "--output", dense, "--overwrite")
    assert status == 2
    assert "which replacing it would delete" in err
    assert (dense / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", ","], "--tasks ',': names no task."),
        (["--batch-size", "many"], "argument --batch-size: 'many' is neither a number nor auto"),
        (["--limit", "0"], "limit=0 must be at least 1."),
        (["--overwrite"], "--overwrite goes with --output."),
        (["--offline-data", "nowhere"], "nowhere: holds neither multiple_choice.parquet nor open_qa.parquet"),
        (["--offline"], "unknown argument --offline; did you mean --offline-data?"),
    ],
)
def test_mistakes_are_one_line(upcycled_moe, dense, options, message):
    status, out, err = upcycled_moe("evaluate", dense, *options)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_without_the_harness_it_says_how_to_get_it(upcycled_moe, dense, no_harness):
    status, _, err = upcycled_moe("evaluate", dense)
    assert (status, err.count("\n")) == (2, 1)
    assert "pip install 'upcycled-moe[evaluation]'" in err


def test_a_checkpoint_that_is_not_there(upcycled_moe, text_file):
    status, _, err = upcycled_moe("evaluate", "./nowhere", "--perplexity-data", text_file)
    assert (status, err.count("\n")) == (2, 1)
    assert "no such folder" in err


def test_nothing_heavy_is_imported_for_help():
    code = (
        "import sys\nfrom upcycled_moe.cli.main import main\n"
        "try:\n    main(['evaluate', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'lm_eval', 'datasets', 'tqdm'} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
    assert "--offline-data" in result.stdout
