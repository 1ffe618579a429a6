"""The demo's table and pictures say what the training logs say."""

import json

import pytest

from upcycled_moe.common.routing_log import ROUTING_LOG_FILE, append_routing
from upcycled_moe.demo.report import print_table, read_run, write_plots


LOADS = [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]


def write_run(folder, is_moe):
    folder.mkdir()
    entries = []
    for step in (10, 20):
        router = {"router/max_violation": 0.8, "router/entropy": 1.05} if is_moe else {}
        if is_moe:
            shown = LOADS if step == 20 else [[1.0, 0.0, 0.0]] * 2
            layers = {layer: {"load": loads} for layer, loads in enumerate(shown)}
            append_routing(folder / ROUTING_LOG_FILE, step, 1000, layers)
        entries.append({"step": step, "loss": 4.0, **router})
        entries.append({"step": step, "eval_fiction_loss": 3.0, "eval_fiction_perplexity": 20.0855})
        entries.append({"step": step, "eval_loss": 3.5 - step / 100, "eval_perplexity": 30.0})
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    return folder


@pytest.fixture
def dense_run(tmp_path):
    return read_run("dense", write_run(tmp_path / "dense", is_moe=False))


@pytest.fixture
def moe_run(tmp_path):
    return read_run("Router Upcycling", write_run(tmp_path / "moe", is_moe=True))


def test_last_value_and_loads_are_those_of_the_log(dense_run, moe_run):
    assert moe_run.last("eval_loss") == pytest.approx(3.3)
    assert moe_run.loads() == LOADS
    assert dense_run.loads() == []
    assert dense_run.last("router/entropy") is None


def test_table_has_a_row_for_each_model_and_a_column_for_each_domain(dense_run, moe_run, capsys):
    print_table(dense_run, [dense_run, moe_run])
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "Router Upcycling" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "Router Upcycling",
        "3.3000",
        "20.09",
        "1.80",
        "1.050",
    ]
    assert "fiction" in printed


def test_plots_are_pictures(dense_run, moe_run, tmp_path):
    pytest.importorskip("matplotlib")
    for path in write_plots(dense_run, [dense_run, moe_run], tmp_path / "plots"):
        assert path.read_bytes().startswith(b"\x89PNG")
