import json
import subprocess
import sys

import pytest
from dense_checkpoints import write_dense

from upcycled_moe.evaluation.results import EvaluationReport


@pytest.fixture
def no_harness(monkeypatch):
    """A machine where lm-evaluation-harness is not installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def evaluate_text(upcycled_moe, dense, text_file, *options):
    return upcycled_moe("evaluate", dense, "--perplexity-data", text_file, "--tokens-per-domain", 300, *options)


def test_table_of_perplexity(upcycled_moe, dense, text_file, tmp_path):
    worse = write_dense(tmp_path / "worse", seed=1)
    names = (f"one={dense}", f"two={dense}", f"three={worse}")
    status, out, err = upcycled_moe("evaluate", *names, "--perplexity-data", text_file, "--tokens-per-domain", 300)
    assert (status, err) == (0, "")
    [row] = [line for line in out.splitlines() if line.startswith("sample")]
    assert out.splitlines()[1].split() == ["Domain", "Tokens", "one", "two", "three"]
    bits = [float(cell.rstrip("*")) for cell in row.split() if cell.count(".") == 1 and len(cell.rstrip("*")) == 5]
    marked = [cell for cell in row.split() if cell.endswith("*")]
    assert len(bits) == row.count("±") == 3
    # Equal ones are both the best.
    assert [float(cell.rstrip("*")) for cell in marked] == [bit for bit in bits if bit == min(bits)]


def test_nothing_is_the_best_where_all_are_equal(upcycled_moe, dense, text_file):
    names = (f"one={dense}", f"two={dense}")
    _, out, _ = upcycled_moe("evaluate", *names, "--perplexity-data", text_file, "--tokens-per-domain", 300)
    [row] = [line for line in out.splitlines() if line.startswith("sample")]
    assert "*" not in row


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
