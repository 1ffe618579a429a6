"""Training steps of an upcycled model, of its dense parent and of stock Qwen3-MoE: speed, MFU and memory.

    python benchmarks/training.py [--shape small|0.5b] [--rounds 3] [--steps 4] [--json FILE]

Every contestant is trained by its Trainer, this package's or Transformers', on the same random tokens, from random
weights; each round makes all of them anew, in turns. On a GPU in bfloat16 with float32 weights, else in float32.
`--shape small` takes a CPU less than six minutes.

MFU counts operations as `common/flops.py` does. The router's share of a step is the time in routers, their losses and
statistics, of which the profiler sees the forward pass; the backward pass of routers and losses counts twice that.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
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
from upcycled_moe.common.flops import peak_flops, training_flops_per_token
from upcycled_moe.common.routing import RouterStatistics
from upcycled_moe.train.data.blocks import collate_blocks
from upcycled_moe.train.trainer import UpcyclingTrainer
from upcycled_moe.train.training_arguments import UpcyclingTrainingArguments


# Model, blocks of a micro-batch, tokens of a block.
SETTINGS = {"small": (SMALL, 2, 256), "0.5b": (QWEN2_0_5B, 1, 4096)}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
LOSS_CHUNK_TOKENS = 1024
ROUTER_PARTS = ("router", "router losses", "router statistics")
# A backward pass multiplies twice for each product of the forward pass.
FORWARD_AND_BACKWARD = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SETTINGS, default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a contestant in a round")
    parser.add_argument("--only", nargs="+", help="contestants to run, by a part of their name")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        runs, shares = compare(options, device, folder)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    print(f"{machine()}, on {where}, shape {options.shape}")
    report(runs, shares, peak_flops(device, torch.bfloat16), options.json)


def compare(
    options: argparse.Namespace, device: torch.device, folder: str
) -> tuple[dict[str, list["Run"]], dict[str, float]]:
    """Return the runs of each contestant, and the router's share of a step of those that have one to show."""
    contestants = {
        name: start
        for name, start in contestants_of(*SETTINGS[options.shape], device.type == "cuda", folder).items()
        if not options.only or any(part in name for part in options.only)
    }
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(options.rounds):
        for name, start in contestants.items():
            if (run := run_contestant(start, options.steps, device)) is not None:
                runs[name].append(run)
    shares = {
        name: router_share(start, options.steps, device)
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
        "dense, stock Trainer": (Trainer, TrainingArguments, Qwen2Config(**shape), attention),
        "Qwen3-MoE, stock Trainer": (
            Trainer,
            TrainingArguments,
            Qwen3MoeConfig(**stock, output_router_logits=True),
            {**attention, "experts_implementation": "grouped_mm"},
        ),
    }
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        # It copies the weights of each token's experts: more than a GPU holds at this size.
        if implementation == "batched_mm" and on_gpu and block_size > 1024:
            continue
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
            return trainer_class(
                model=model,
                args=arguments_class(
                    output_dir=folder,
                    max_steps=num_steps,
                    per_device_train_batch_size=batch_size,
                    logging_steps=10,
                    save_strategy="no",
                    eval_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    bf16=on_gpu,
                    use_cpu=not on_gpu,
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


def run_contestant(start: Callable[[int], Trainer], num_steps: int, device: torch.device) -> Run | None:
    """Return times and peak memory of a contestant's steps, after two that are not counted; None if memory is full."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer = start(num_steps + 2)
        with quiet():
            trainer.train()
    except torch.OutOfMemoryError:
        return None
    ends = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, StepTimes)).ends
    step_s = [end - begin for begin, end in pairwise(ends[1:])]
    return Run(trainer, step_s, torch.cuda.max_memory_allocated() if device.type == "cuda" else None)


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what Trainers print of each step."""
    with mock.patch("builtins.print"):
        yield


def router_share(start: Callable[[int], Trainer], num_steps: int, device: torch.device) -> float:
    """Return the share of a step that routers, their losses and their statistics take."""
    trainer = start(num_steps)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _named_router_parts(), quiet(), profile(activities=activities) as profiler, record_function("training"):
        trainer.train()
        if device.type == "cuda":
            torch.cuda.synchronize()
    on_device = "device_time_total" if device.type == "cuda" else "cpu_time_total"
    times = {event.key: getattr(event, on_device) for event in profiler.key_averages()}
    total = times["training"]
    parts = sum(
        times.get(name, 0) * (1 if name == "router statistics" else FORWARD_AND_BACKWARD) for name in ROUTER_PARTS
    )
    return parts / total


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
            (modeling.UpcycledQwenMoePreTrainedModel, "_router_losses", losses),
            (RouterStatistics, "update", statistics),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, named(name, getattr(owner, attribute))))
        yield


def report(runs: dict[str, list[Run]], shares: dict[str, float], peak: float | None, json_file: Path | None) -> None:
    """Print a table, and write it as JSON where asked."""
    unit = "MFU, %" if peak else "GFLOP/s"
    print(f"\n| | step, s | tokens/s | {unit} | ÷ dense | peak memory, GB | router's share, % |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    results, dense_flops = [], None
    for name, rounds in runs.items():
        if not rounds:
            print(f"| {name} | out of memory | | | | | |")
            continue
        step_s = [second for run in rounds for second in run.step_s]
        tokens_per_s = rounds[0].num_tokens / median(step_s)
        flops = tokens_per_s * rounds[0].flops_per_token
        dense_flops = dense_flops or flops
        memory = max(run.peak_memory_bytes or 0 for run in rounds)
        share = shares.get(name)
        results.append(
            {
                "contestant": name,
                "step_s": step_s,
                "tokens_per_second": tokens_per_s,
                "flops_per_second": flops,
                "mfu": flops / peak if peak else None,
                "peak_memory_bytes": memory or None,
                "router_share": share,
            }
        )
        print(
            f"| {name} | {spread(step_s)} | {tokens_per_s:,.0f} | "
            f"{100 * flops / peak if peak else flops / 1e9:.3g} | {flops / dense_flops:.2f} | "
            f"{f'{memory / 1e9:.2f}' if memory else ''} | {f'{100 * share:.1f}' if share is not None else ''} |"
        )
    if json_file:
        json_file.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
