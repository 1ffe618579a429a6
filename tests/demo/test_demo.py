"""The demo runs to its end and leaves what it names."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_demo_runs_and_names_what_it_wrote(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "upcycled_moe.demo", "--out", str(out), "--steps", "15"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Equal: largest |Δlogit|" in result.stdout
    assert "Router Upcycling" in result.stdout
    written = result.stdout.split("Written:")[1].split()
    assert len(written) == 5
    for path in written:
        assert (tmp_path / path).exists()


def test_demo_does_not_delete_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    command = [sys.executable, "-m", "upcycled_moe.demo", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "holds something else" in result.stderr
    assert (tmp_path / "thesis.txt").exists()
