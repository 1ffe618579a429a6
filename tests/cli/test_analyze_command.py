"""`upcycled-moe analyze`: what it prints, what it writes, and how it ends."""

import json
import signal

import pytest
import torch
from warm_python import RUN_THE_COMMAND_LINE

from upcycled_moe.analysis.results import AnalysisReport, CheckpointResult, MeasureResult
from upcycled_moe.cli.analyze import print_analysis, summarize


@pytest.fixture(scope="module")
def moe(dense, tmp_path_factory):
    """A converted checkpoint that no test writes into."""
    from upcycled_moe.conversion.convert import convert
    from upcycled_moe.conversion.recipe import ConversionRecipe
    from upcycled_moe.conversion.source import open_source

    out = tmp_path_factory.mktemp("analyzed") / "moe"
    convert(open_source(str(dense)), ConversionRecipe(router="linear", num_experts=4), out)
    return out


@pytest.fixture
def arguments(moe, text_file, tmp_path):
    """`arguments(checkpoints, *options)`: a short analysis into `tmp_path / "out"`."""

    def make(*options, checkpoints=(moe,)):
        text = ("--data", text_file, "--tokens-per-domain", 256, "--block-size", 64)
        return ["analyze", *checkpoints, *text, "--output", tmp_path / "out", *options]

    return make


def test_a_table_says_what_was_found_and_where(upcycled_moe, arguments, moe, dense, tmp_path):
    status, out, err = upcycled_moe(*arguments(checkpoints=(f"first={moe}", f"second [b]={moe}")))
    assert (status, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0] == "Means over layers (256 tokens of 1 domain)"
    assert lines[1] == "Figure first second [b]"
    in_common = lines.index("Checkpoints Router saturation Router saturation that the loads alone give")
    assert lines[in_common + 1].startswith("first, second [b] 1 0.")
    assert any(line.startswith("Router saturation matches experts by their number") for line in lines)
    assert f"The experts of first are compared with those of {dense}." in lines
    assert lines[-1] == f"Wrote {tmp_path / 'out'}; look at {tmp_path / 'out' / 'report.html'}."
    assert (tmp_path / "out" / "report.html").is_file()


def test_json_holds_the_means_that_the_report_shows(upcycled_moe, arguments, moe, tmp_path):
    status, out, err = upcycled_moe(*arguments("--json"))
    assert (status, err) == (0, "")
    printed = json.loads(out)
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert printed["domains"] == report["domains"] == ["sample"]
    assert printed["comparisons"] == []
    checkpoint = printed["checkpoints"]["moe"]
    assert checkpoint["path"] == str(moe)
    assert checkpoint["num_tokens"] == {"sample": 256}
    entropies = report["checkpoints"][0]["measures"]["routing"]["per_layer"]["entropy"]
    assert checkpoint["figures"]["routing.entropy"] == pytest.approx(sum(entropies) / 3, rel=1e-5)
    assert checkpoint["figures"]["expert_weights.parent_divergence"] == 0.0


def _report(**num_tokens):
    measures = {
        "routing": MeasureResult({"entropy": [1.25, 1.5], "load_entropy": [None, None]}, notes=["Said of all."]),
        "expert_weights": MeasureResult({"parent_divergence": [None, None]}),
    }
    checkpoints = [
        CheckpointResult(name, "path", "mixtral", 4, 2, [0, 1], "digest", {"text": number}, measures)
        for name, number in num_tokens.items()
    ]
    return AnalysisReport({}, ["text"], checkpoints, [], {}, ["Said at last."], ["Said of pairs."])


def test_rows_of_many_checkpoints_stay_on_one_line(capsys):
    names = [f"run_of_the_large_model_{number}" for number in range(12)]
    print_analysis(_report(**dict.fromkeys(names, 4096)), "out")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Figure", *names] in lines
    assert ["Entropy", "of", "the", "routing", "probabilities", *["1.38"] * 12] in lines
    assert not any(line[:4] == ["Entropy", "of", "the", "load"] for line in lines)


def test_tokens_are_told_of_each_checkpoint_where_they_differ(capsys):
    print_analysis(_report(first=4096, second=5000), "out")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["Means", "over", "layers", "(text", "of", "1", "domain)"]
    assert lines[2] == ["Tokens", "4,096", "5,000"]


def test_all_notes_are_printed_and_no_parent_that_nothing_was_compared_with(capsys):
    report = _report(first=1, second=1)
    print_analysis(report, "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:-1] == ["Said of pairs.", "Said of all.", "Said at last."]
    assert not any("compared with" in line for line in lines)
    printed = summarize(report)
    assert printed["notes"] == ["Said at last.", "Said of pairs."]
    assert printed["checkpoints"]["first"]["notes"] == ["Said of all."]
    assert printed["checkpoints"]["first"]["figures"]["expert_weights.parent_divergence"] is None


def test_a_whole_process_needs_no_leave_for_code_in_a_folder(warm_python, arguments, tmp_path):
    result = warm_python.run(RUN_THE_COMMAND_LINE, *arguments())
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "out" / "report.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "analyze: error: the following arguments are required: CKPT, --output, --data"),
        (["x", "--data", "y"], "the following arguments are required: --output"),
        (["x", "--data", "y", "--output", "z", "--batch-size", "0"], "batch_size=0 must be at least 1."),
        (["x", "--data", "y", "--output", "z", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["x", "--data", "y", "--output", "z", "--tokens", "5"], "unknown argument --tokens; see"),
        (["no/such/folder", "--data", "y", "--output", "z"], "no/such/folder: no such folder, and not a Hub id"),
        (["=x", "--data", "y", "--output", "z"], "'=x': give a checkpoint as PATH or NAME=PATH."),
    ],
)
def test_wrong_usage_is_one_line(upcycled_moe, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = upcycled_moe("analyze", *options)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dense_checkpoint_is_one_line(upcycled_moe, arguments, dense, tmp_path):
    status, out, err = upcycled_moe(*arguments(checkpoints=(dense,)))
    assert (status, out) == (2, "")
    assert f"{dense}: qwen2 models have no MoE layer that can be looked into; give an upcycled model, or" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_memory_says_what_helps(upcycled_moe, arguments, monkeypatch, tmp_path):
    def fill(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.nn.Embedding, "forward", fill)
    status, out, err = upcycled_moe(*arguments())
    assert (status, out) == (1, "")
    assert "lower --batch-size or --block-size, or give --dtype bfloat16, or set CUDA_VISIBLE_DEVICES= to" in err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_analysis_leaves_nothing(warm_python, arguments, tmp_path):
    code = (
        "import os, signal\n"
        # A job in the background may be started with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from upcycled_moe.analysis import analyze\n"
        f"analyze.run_pass = lambda *args: os.kill(os.getpid(), {int(signal.SIGINT)})\n"
    )
    result = warm_python.run(code + RUN_THE_COMMAND_LINE, *arguments())
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "upcycled-moe: error: interrupted.\n")
    assert list(tmp_path.iterdir()) == []
