"""The folder that an analysis writes: whole or not at all, and nothing replaced without leave."""

import json
import os
import shutil
import signal

import pytest
from dense_checkpoints import exit_status, folder_hashes

from upcycled_moe.analysis import output as output_module
from upcycled_moe.analysis.output import write_analysis
from upcycled_moe.analysis.report import write
from upcycled_moe.analysis.results import AnalysisReport
from upcycled_moe.analysis.settings import AnalysisSettings
from upcycled_moe.common.output_folder import OutputError
from upcycled_moe.common.progress import Progress
from upcycled_moe.common.provenance import RecordedParent


@pytest.fixture
def settings(labelled_text):
    return AnalysisSettings(data=[str(labelled_text)], tokens_per_domain=64)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """They take most of the time, and nothing here looks at them."""
    monkeypatch.setattr(write, "can_draw", lambda: False)


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(output_module, "analyze", lambda *args, **kwargs: pytest.fail("work is done"))


def test_the_folder_holds_the_report(moe_checkpoint, settings, tmp_path):
    report = write_analysis([str(moe_checkpoint("linear"))], settings, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"report.html", "report.json"} <= names
    written = AnalysisReport.from_dict(json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8")))
    assert written.checkpoints[0].measures.keys() == report.checkpoints[0].measures.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_report_is_replaced_with_leave_only(moe_checkpoint, settings, tmp_path):
    out, checkpoint = tmp_path / "out", str(moe_checkpoint("linear"))
    write_analysis([checkpoint], settings, out)
    before = folder_hashes(out)
    (out / "report.json").touch()
    with pytest.raises(OutputError, match="exists and is not empty; give another folder, or --overwrite"):
        write_analysis([checkpoint], settings, out)
    assert folder_hashes(out) == before
    write_analysis([str(moe_checkpoint("mixtral"))], settings, out, overwrite=True)
    assert folder_hashes(out)["report.json"] != before["report.json"]


def test_other_folders_are_not_replaced(moe_checkpoint, settings, tmp_path, no_work):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"holds no report \(report.json\), so --overwrite does not replace it"):
        write_analysis([str(moe_checkpoint("linear"))], settings, tmp_path, overwrite=True)
    assert (tmp_path / "config.json").read_text() == "{}"


def test_the_report_of_another_program_is_not_replaced(moe_checkpoint, settings, tmp_path, no_work):
    (tmp_path / "report.json").write_text('{"format": 1, "tests": 12}')
    with pytest.raises(OutputError, match="holds no report"):
        write_analysis([str(moe_checkpoint("linear"))], settings, tmp_path, overwrite=True)
    assert (tmp_path / "report.json").read_text() == '{"format": 1, "tests": 12}'


def test_a_report_with_files_of_others_beside_it_is_not_replaced(moe_checkpoint, settings, tmp_path):
    out, checkpoint = tmp_path / "out", str(moe_checkpoint("linear"))
    write_analysis([checkpoint], settings, out)
    (out / "thesis.tex").write_text("two years of work")
    with pytest.raises(OutputError, match=r"holds thesis\.tex, which is no part of the report there"):
        write_analysis([checkpoint], settings, out, overwrite=True)
    assert (out / "thesis.tex").read_text() == "two years of work"


@pytest.mark.parametrize("what", ["checkpoint", "text", "parent"])
def test_nothing_that_is_read_may_be_replaced(moe_checkpoint, labelled_text, tmp_path, no_work, what):
    out = tmp_path / "out"
    paths = {"checkpoint": moe_checkpoint("linear"), "text": labelled_text, "parent": moe_checkpoint("mixtral")}
    paths[what] = shutil.copytree(paths[what], out / "inside")
    settings = AnalysisSettings(data=[str(paths["text"])], parent=str(paths["parent"]))
    with pytest.raises(OutputError, match="inside, which replacing it would delete; give another folder"):
        write_analysis([f"name={paths['checkpoint']}"], settings, out, overwrite=True)


@pytest.mark.parametrize("pattern", ["out/*/validation.jsonl", "*/words/*.jsonl", "."])
def test_text_that_a_pattern_or_a_folder_around_finds_may_not_be_replaced(
    moe_checkpoint, labelled_text, tmp_path, no_work, pattern
):
    out = shutil.copytree(labelled_text, tmp_path / "out")
    settings = AnalysisSettings(data=[str(tmp_path / pattern)])
    with pytest.raises(OutputError, match=r"validation\.jsonl, which replacing it would delete"):
        write_analysis([str(moe_checkpoint("linear"))], settings, out, overwrite=True)


def test_the_parent_that_a_checkpoint_records_may_not_be_replaced(
    moe_checkpoint, settings, tmp_path, no_work, monkeypatch
):
    parent = shutil.copytree(moe_checkpoint("mixtral"), tmp_path / "out" / "dense")
    monkeypatch.setattr(output_module, "recorded_parent", lambda path: RecordedParent(str(parent), ()))
    with pytest.raises(OutputError, match="dense, which replacing it would delete"):
        write_analysis([str(moe_checkpoint("linear"))], settings, tmp_path / "out", overwrite=True)


def test_what_fails_leaves_nothing(moe_checkpoint, settings, tmp_path, monkeypatch):
    def fail(report, folder):
        (folder / "report.json").write_text("{")
        raise OSError("the disk is full")

    monkeypatch.setattr(output_module, "write_report", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_analysis([str(moe_checkpoint("linear"))], settings, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_came_meanwhile_stays(moe_checkpoint, settings, tmp_path):
    class Other(Progress):
        def task(self, *arguments):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "report.json").write_text("another")
            return super().task(*arguments)

    with pytest.raises(OutputError, match="exists and is not empty"):
        write_analysis([str(moe_checkpoint("linear"))], settings, tmp_path / "out", progress=Other())
    assert (tmp_path / "out" / "report.json").read_text() == "another"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class _Kill(Progress):
    """Kills the process when the analysis begins."""

    def task(self, description, total, unit):
        os.kill(os.getpid(), signal.SIGKILL)


def _analyze_killed(checkpoint, settings, out):
    write_analysis([checkpoint], settings, out, overwrite=True, progress=_Kill())


def test_what_is_killed_leaves_the_old_report_and_can_be_run_again(moe_checkpoint, settings, tmp_path):
    out, checkpoint = tmp_path / "out", str(moe_checkpoint("linear"))
    write_analysis([checkpoint], settings, out)
    before = folder_hashes(out)
    assert exit_status(_analyze_killed, checkpoint, settings, out) == -signal.SIGKILL
    assert folder_hashes(out) == before
    write_analysis([str(moe_checkpoint("mixtral"))], settings, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
