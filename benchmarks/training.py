"""Training steps of an upcycled model, of its dense parent and of stock Qwen3-MoE: speed, MFU and memory.

    python benchmarks/training.py [--shape small|0.5b] [--rounds 3] [--steps 4] [--json FILE]

Every contestant is trained by its Trainer, this package's or Transformers', on the same random tokens, from random
weights; each round makes all of them anew, in turns. Every step has its log; probes and pictures of the routing, which
a run makes at every tenth log, are off. On a GPU in bfloat16 with float32 weights, else in float32. `--shape small`
takes two CPUs one to two minutes, without `batched_mm`, which a CPU runs only where `--only` names nothing else by it.

MFU counts operations as `common/flops.py` does. The router's share is of the time of whole optimizer steps after the
first ones, as the profiler sees it: routers with their selection, their losses, the backward pass of both, and the
statistics. Not in it: the optimizer's work on routers, and moving tokens to experts. On a GPU it is time of kernels.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from measure import machine, spread
from shapes import QWEN2_0_5B, SMALL
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoModelForCausalLM,
    Qwen2Config,
    Qwen3MoeConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import modeling_upcycled_moe.modeling_upcycled_moe as modeling
from modeling_upcycled_moe import UpcycledQwenMoeConfig
from upcycled_moe.common.blocks import collate_blocks
from upcycled_moe.common.flops import peak_flops, training_flops_per_token
from upcycled_moe.common.routing import RouterStatistics
from upcycled_moe.train.trainer import UpcyclingTrainer
from upcycled_moe.train.training_arguments import UpcyclingTrainingArguments


# Model, blocks of a micro-batch, tokens of a block.
SETTINGS = {"small": (SMALL, 2, 256), "0.5b": (QWEN2_0_5B, 1, 4096)}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
LOSS_CHUNK_TOKENS = 1024
DENSE = "dense, stock Trainer"
# First steps of a Trainer, which neither the times nor the profile have.
NUM_WARMUP_STEPS = 2
NUM_PROFILED_STEPS = 2
ROUTER_PARTS = ("router", "router losses", "router statistics")
# How the profiler marks operations, and names the backward pass of one.
OPERATION_SCOPE, BACKWARD_PREFIX = 0, "autograd::engine::evaluate_function"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SETTINGS, default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a contestant in a round")
    parser.add_argument("--only", nargs="+", metavar="PART", help="contestants to run, by a part of their name")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    for name in ("rounds", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        contestants = contestants_of(*SETTINGS[options.shape], device.type == "cuda", folder)
        try:
            names, left_out = choose(list(contestants), options.only, slow_contestants(options.shape, device))
        except ValueError as error:
            parser.error(str(error))
        runs, shares = compare({name: contestants[name] for name in names}, options.rounds, options.steps, device)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    print(f"{machine()}, on {where}, shape {options.shape}")
    report(runs, shares, left_out, peak_flops(device, torch.bfloat16), options.json)


def slow_contestants(shape: str, device: torch.device) -> dict[str, str]:
    """Return why contestants are left out unless they are asked for, by name."""
    # It copies the weights of each token's experts.
    if device.type == "cpu":
        return {"upcycled, batched_mm": "takes minutes on a CPU"}
    if SETTINGS[shape][2] > 1024:
        return {"upcycled, batched_mm": "takes more memory than a GPU has"}
    return {}


def choose(
    names: Sequence[str], parts: Sequence[str] | None, slow: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return which of `names` to run, and why others that `parts` name too are left out.

    Raises:
        ValueError: if a part is in no name.
    """
    matches = [[name for name in names if part in name] for part in parts or [""]]
    for part, found in zip(parts or [""], matches, strict=True):
        if not found:
            raise ValueError(f"--only {part}: is in no contestant's name; there are: {'; '.join(names)}")
    wanted = [name for name in names if any(name in found for found in matches)]
    left_out = {name: slow[name] for name in wanted if name in slow and [name] not in matches}
    return [name for name in wanted if name not in left_out], left_out


def compare(
    contestants: Mapping[str, Callable[[int], Trainer]], num_rounds: int, num_steps: int, device: torch.device
) -> tuple[dict[str, list["Run"]], dict[str, float]]:
    """Return the runs of each contestant, and the router's share of a step of those that have one to show."""
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(num_rounds):
        for name, start in contestants.items():
            if (run := run_contestant(start, num_steps, device)) is not None:
                runs[name].append(run)
    shares = {
        name: router_share(profiled_steps(start, device), device)
        for name, start in contestants.items()
        if runs[name] and runs[name][0].has_router
    }
    return runs, shares


class Run:
    """What a contestant did in one round."""

    def __init__(self, trainer: Trainer, step_s: list[float], peak_memory_bytes: int | None):
        inputs = trainer.train_dataset[0]["input_ids"]
        self.step_s = step_s
        self.peak_memory_bytes = peak_memory_bytes
        self.num_tokens = trainer.args.per_device_train_batch_size * len(inputs)
        self.flops_per_token = training_flops_per_token(trainer.model.config, len(inputs))
        self.has_router = isinstance(trainer, UpcyclingTrainer)


def contestants_of(
    shape: dict[str, Any], batch_size: int, block_size: int, on_gpu: bool, folder: str
) -> dict[str, Callable[[int], Trainer]]:
    """Return by name what makes a Trainer for a number of steps; they write into `folder`."""
    attention = {"attn_implementation": "sdpa"}
    stock = {**shape, **EXPERTS, "moe_intermediate_size": shape["intermediate_size"], "norm_topk_prob": True}
    upcycled = UpcycledQwenMoeConfig(**shape, **EXPERTS)
    kinds = {
        DENSE: (Trainer, TrainingArguments, Qwen2Config(**shape), attention),
        "Qwen3-MoE, stock Trainer": (
            Trainer,
            TrainingArguments,
            Qwen3MoeConfig(**stock, output_router_logits=True),
            {**attention, "experts_implementation": "grouped_mm"},
        ),
    }
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        kinds[f"upcycled, {implementation}"] = (
            UpcyclingTrainer,
            UpcyclingTrainingArguments,
            upcycled,
            {**attention, "experts_implementation": implementation},
        )
    kinds["upcycled, grouped_mm, chunked loss"] = kinds["upcycled, grouped_mm"]

    def starter(name: str) -> Callable[[int], Trainer]:
        trainer_class, arguments_class, config, options = kinds[name]

        def start(num_steps: int) -> Trainer:
            torch.manual_seed(0)
            with torch.device("cuda" if on_gpu else "cpu"):
                model = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()), **options)
            if "chunked" in name:
                model.loss_chunk_tokens = LOSS_CHUNK_TOKENS
            blocks = torch.randint(shape["vocab_size"], (num_steps * batch_size, block_size)).tolist()
            own = {"router_probe_steps": 0} if arguments_class is UpcyclingTrainingArguments else {}
            return trainer_class(
                model=model,
                args=arguments_class(
                    output_dir=tempfile.mkdtemp(dir=folder),
                    max_steps=num_steps,
                    per_device_train_batch_size=batch_size,
                    logging_steps=1,
                    save_strategy="no",
                    eval_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    bf16=on_gpu,
                    use_cpu=not on_gpu,
                    **own,
                ),
                train_dataset=[{"input_ids": block} for block in blocks],
                data_collator=collate_blocks,
                callbacks=[StepTimes()],
            )

        return start

    return {name: starter(name) for name in kinds}


class StepTimes(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next."""

    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.ends.append(time.perf_counter())


class StepsProfile(TrainerCallback):
    """Profiles all steps after the first, from the end of a step to the end of the last; after [`StepTimes`]."""

    def __init__(self, profiler: profile, stack: ExitStack):
        self.profiler = profiler
        self.stack = stack

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == NUM_WARMUP_STEPS:
            self.stack.enter_context(self.profiler)
            self.stack.enter_context(record_function("steps"))
        elif state.global_step == state.max_steps:
            self.stack.close()


def run_contestant(start: Callable[[int], Trainer], num_steps: int, device: torch.device) -> Run | None:
    """Return times and peak memory of a contestant's steps, after the warm-up; None if memory is full."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer = start(NUM_WARMUP_STEPS + num_steps)
        with quiet():
            trainer.train()
    except torch.OutOfMemoryError:
        return None
    ends = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StepTimes)).ends
    step_s = [end - begin for begin, end in pairwise(ends[NUM_WARMUP_STEPS - 1 :])]
    return Run(trainer, step_s, torch.cuda.max_memory_allocated() if device.type == "cuda" else None)


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what Trainers print of each step."""
    with mock.patch("builtins.print"):
        yield


def profiled_steps(start: Callable[[int], Trainer], device: torch.device) -> list[FunctionEvent]:
    """Return what the profiler sees of whole optimizer steps of a contestant, after the warm-up."""
    trainer = start(NUM_WARMUP_STEPS + NUM_PROFILED_STEPS)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    profiler = profile(activities=activities)
    with ExitStack() as stack, _named_router_parts(), quiet():
        trainer.add_callback(StepsProfile(profiler, stack))
        trainer.train()
    return profiler.events()


def router_share(events: Sequence[FunctionEvent], device: torch.device) -> float:
    """Return the share of profiled steps that routers, their losses, the backward pass of both and statistics take."""
    on_gpu = device.type == "cuda"
    events = [event for event in events if event.device_type == DeviceType.CPU]
    if on_gpu:
        # The backward pass starts its kernels in a thread of its own.
        total = sum(event.self_device_time_total for event in events)
    else:
        total = sum(event.cpu_time_total for event in events if event.name == "steps")
    # Forward pass and backward pass of an operation have the same number in the same thread; several operations may
    # have it, of which the last to start is the one with a backward pass.
    is_of_router: dict[tuple[int, int], bool] = {}
    counted = []
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.name in ROUTER_PARTS:
            counted.append(event)
        elif event.name.startswith(BACKWARD_PREFIX):
            if is_of_router.get((event.fwd_thread, event.sequence_nr), False):
                counted.append(event)
        elif event.scope == OPERATION_SCOPE and event.sequence_nr >= 0:
            is_of_router[event.thread, event.sequence_nr] = _is_in_router_part(event)
    return sum(event.device_time_total if on_gpu else event.cpu_time_total for event in counted) / total


def _is_in_router_part(event: FunctionEvent) -> bool:
    while event is not None and event.name not in ROUTER_PARTS:
        event = event.cpu_parent
    return event is not None


@contextmanager
def _named_router_parts() -> Iterator[None]:
    """Give the profiler names for what only a router needs."""

    def named(name: str, function: Callable) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            with record_function(name):
                return function(*args, **kwargs)

        return call

    router, losses, statistics = ROUTER_PARTS
    with ExitStack() as stack:
        for owner, attribute, name in (
            (modeling.Router, "forward", router),
            (modeling, "router_losses", losses),
            (RouterStatistics, "update", statistics),
            (RouterStatistics, "metrics", statistics),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, named(name, getattr(owner, attribute))))
        yield


def report(
    runs: dict[str, list[Run]],
    shares: dict[str, float],
    left_out: dict[str, str],
    peak: float | None,
    json_file: Path | None,
) -> None:
    """Print a table, and write it as JSON where asked."""
    unit = "MFU, %" if peak else "GFLOP/s"
    print(f"\n| | step, s | tokens/s | {unit} | ÷ dense | peak memory, GB | router's share, % |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    results = []
    dense_flops = _flops_per_second(runs[DENSE]) if runs.get(DENSE) else None
    for name, rounds in runs.items():
        if not rounds:
            print(f"| {name} | out of memory | | | | | |")
            continue
        step_s = [second for run in rounds for second in run.step_s]
        flops = _flops_per_second(rounds)
        memory = max(run.peak_memory_bytes or 0 for run in rounds)
        result = {
            "contestant": name,
            "step_s": step_s,
            "tokens_per_second": flops / rounds[0].flops_per_token,
            "flops_per_second": flops,
            "mfu": flops / peak if peak else None,
            "flops_ratio_to_dense": flops / dense_flops if dense_flops else None,
            "peak_memory_bytes": memory or None,
            "router_share": shares.get(name),
        }
        results.append(result)
        cells = (
            name,
            spread(step_s),
            f"{result['tokens_per_second']:,.0f}",
            f"{100 * flops / peak if peak else flops / 1e9:.3g}",
            f"{flops / dense_flops:.2f}" if dense_flops else "",
            f"{memory / 1e9:.2f}" if memory else "",
            f"{100 * shares[name]:.1f}" if name in shares else "",
        )
        print(f"| {' | '.join(cells)} |")
    for name, why in left_out.items():
        print(f"| {name} | left out: {why}; `--only {name.rpartition(' ')[2]}` runs it | | | | | |")
    if json_file:
        json_file.write_text(json.dumps(results, indent=2), encoding="utf-8")


def _flops_per_second(rounds: list[Run]) -> float:
    step_s = median(second for run in rounds for second in run.step_s)
    return rounds[0].num_tokens * rounds[0].flops_per_token / step_s


if __name__ == "__main__":
    main()
