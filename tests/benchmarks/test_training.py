"""The benchmark of training: what it runs, what it tells, and what it counts as the router's share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def training():
    """The script as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import training
    finally:
        sys.path.remove(str(BENCHMARKS))
    return training


@pytest.fixture
def run(training, monkeypatch, capsys, tmp_path):
    """`run("--only", "eager")`: what the script prints, and its results, with models of a few thousand weights."""
    monkeypatch.setattr(training, "SETTINGS", {"small": (TINY, 2, 32)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run_script(*arguments):
        results = tmp_path / "results.json"
        monkeypatch.setattr(sys, "argv", ["training.py", *arguments, "--json", str(results)])
        training.main()
        return capsys.readouterr().out, {result["contestant"]: result for result in json.loads(results.read_text())}

    return run_script


def test_steps_are_counted_after_the_warm_up_and_share_their_time_with_the_router(run):
    table, results = run("--only", "eager", "--rounds", "2", "--steps", "3")
    [result] = results.values()
    assert len(result["step_s"]) == 2 * 3
    assert 0 < result["router_share"] < 1
    # There is no dense one that it could be held against.
    assert result["flops_ratio_to_dense"] is None
    [row] = [line for line in table.splitlines() if "eager" in line]
    assert row.split("|")[5].strip() == ""


def test_other_contestants_are_held_against_the_dense_one(run):
    _, results = run("--only", "dense", "eager", "--rounds", "1", "--steps", "1")
    dense, upcycled = (results[name] for name in ("dense, stock Trainer", "upcycled, eager"))
    ratio = upcycled["flops_per_second"] / dense["flops_per_second"]
    assert upcycled["flops_ratio_to_dense"] == pytest.approx(ratio)


def test_what_takes_minutes_runs_only_by_its_own_name(training, capsys):
    slow = training.slow_contestants("small", CPU)
    assert list(slow) == ["upcycled, batched_mm"]
    names = ["dense, stock Trainer", "upcycled, eager", "upcycled, batched_mm"]
    assert training.choose(names, None, slow) == (names[:2], slow)
    assert training.choose(names, ["upcycled"], slow) == (names[1:2], slow)
    assert training.choose(names, ["batched_mm", "upcycled"], slow) == (names[1:], {})
    training.report({}, {}, slow, None, None)
    row = "| upcycled, batched_mm | left out: takes minutes on a CPU; `--only batched_mm` runs it |"
    assert row in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "eager", "nonsense"], "--only nonsense: is in no contestant's name; there are: dense, stock"),
        (["--rounds", "0"], "--rounds 0: give 1 or more"),
        (["--steps", "-1"], "--steps -1: give 1 or more"),
    ],
)
def test_what_cannot_be_run_is_a_usage_error(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_every_counted_step_has_its_log(training, tmp_path):
    for start in training.contestants_of(TINY, 2, 32, False, str(tmp_path)).values():
        trainer = start(training.NUM_WARMUP_STEPS + 1)
        with training.quiet():
            trainer.train()
        assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3]


def test_whole_steps_after_the_warm_up_are_profiled(training, tmp_path):
    start = training.contestants_of(TINY, 2, 32, False, str(tmp_path))["upcycled, grouped_mm"]

    class Spans(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.span = record_function(f"step {state.global_step + 1}")
            self.span.__enter__()

        def on_optimizer_step(self, args, state, control, **kwargs):
            self.span.__exit__(None, None, None)

    def start_with_spans(num_steps):
        trainer = start(num_steps)
        trainer.add_callback(Spans())
        return trainer

    events = training.profiled_steps(start_with_spans, CPU)
    names = [event.name for event in events]
    profiled_steps = sorted(name for name in names if name.startswith("step "))
    assert profiled_steps == ["step 3", "step 4"]
    assert sum(name.startswith("Optimizer.step") for name in names) == training.NUM_PROFILED_STEPS
    assert names.count("router") == training.NUM_PROFILED_STEPS * TINY["num_hidden_layers"]
    assert names.count("router losses") == training.NUM_PROFILED_STEPS


def test_the_share_has_the_backward_pass_of_the_router_and_of_nothing_else(training):
    tokens = torch.randn(512, 512)
    router, other = torch.randn(512, 512, requires_grad=True), torch.randn(512, 512, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("steps"):
        with record_function("router"):
            scores = tokens @ router
        for _ in range(3):
            scores = scores + tokens @ other
        scores.sum().backward()
    events = profiler.events()
    total_us = sum(event.cpu_time_total for event in events if event.name == "steps")
    [forward_us] = [event.cpu_time_total for event in events if event.name == "router"]
    products = [event for event in events if event.name.endswith("evaluate_function: MmBackward0")]
    assert len(products) == 4
    # The first product of the forward pass is the last of the backward pass.
    backward_us = max(products, key=lambda event: event.time_range.start).cpu_time_total
    assert training.router_share(events, CPU) == pytest.approx((forward_us + backward_us) / total_us)


@pytest.mark.slow
def test_the_script_runs_as_its_first_lines_say(tmp_path):
    results = tmp_path / "results.json"
    options = ["--only", "grouped_mm", "--rounds", "1", "--steps", "1", "--json", str(results)]
    command = [sys.executable, str(BENCHMARKS / "training.py"), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(results.read_text())
    assert [result["contestant"] for result in found] == [
        "upcycled, grouped_mm",
        "upcycled, grouped_mm, chunked loss",
    ]
    for result in found:
        assert len(result["step_s"]) == 1
        assert 0 < result["router_share"] < 1
        assert result["contestant"] in done.stdout
