"""Estimated memory of a training step against its measured peak.

    python benchmarks/memory.py [--shape small|0.5b|7b] [--json FILE]

On a GPU a step of each shape is run, and its peak is what `torch.cuda.max_memory_allocated` says. Without one the step
runs on fake tensors, which have shapes and no contents: the peak is that of all storages alive, at true size, of the
same operations; what a kernel allocates inside is not seen.
"""

import argparse
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import machine
from shapes import QWEN2_0_5B, QWEN2_5_7B, SMALL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Qwen2Config

from modeling_upcycled_moe import UpcycledQwenMoeConfig
from upcycled_moe.train.memory import Layout, estimate_memory


SHAPES = {"small": SMALL, "0.5b": QWEN2_0_5B, "7b": QWEN2_5_7B}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
MIXED = {"mixed_precision": torch.bfloat16}
# What a run may have otherwise than the first one.
LAYOUTS = {
    "float32": {},
    "bf16 autocast": MIXED,
    "bf16 weights": {"weight_dtype": torch.bfloat16},
    "bf16 autocast, chunked loss": {**MIXED, "loss_chunk_tokens": 1024},
    "bf16 autocast, checkpointing": {**MIXED, "gradient_checkpointing": True},
    "bf16 autocast, both": {**MIXED, "gradient_checkpointing": True, "loss_chunk_tokens": 1024},
    "both, 4 x micro-batch": {
        **MIXED,
        "gradient_checkpointing": True,
        "loss_chunk_tokens": 1024,
        "micro_batch_size": 4,
    },
    "both, accumulation": {
        **MIXED,
        "gradient_checkpointing": True,
        "loss_chunk_tokens": 1024,
        "gradient_accumulation_steps": 2,
    },
    "both, adamw_torch": {
        **MIXED,
        "gradient_checkpointing": True,
        "loss_chunk_tokens": 1024,
        "optim": "adamw_torch",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    shape, is_fake = SHAPES[options.shape], not torch.cuda.is_available()
    print(machine(), "on fake tensors" if is_fake else f"on {torch.cuda.get_device_name()}")
    print("\n| model | run | estimate, GB | measured, GB | ratio | highest at |\n|---|---|---:|---:|---:|---|")
    results = []
    for model, config in {
        "dense": Qwen2Config(**shape),
        "8 experts": UpcycledQwenMoeConfig(**shape, **EXPERTS),
    }.items():
        for name, settings in LAYOUTS.items():
            if model == "dense" and settings.get("loss_chunk_tokens"):
                continue
            layout = replace(Layout(sequence_length=options.sequence_length), **settings)
            try:
                measured = measured_peak_bytes(config, layout, fake=is_fake)
            except torch.OutOfMemoryError:
                print(f"| {model} | {name} | | out of memory | | |", flush=True)
                continue
            estimate = estimate_memory(config, layout)
            ratio = estimate.allocated_bytes / measured
            results.append({"model": model, "run": name, "measured_bytes": measured, **estimate.to_dict()})
            print(
                f"| {model} | {name} | {estimate.allocated_bytes / 1e9:.2f} | {measured / 1e9:.2f} | {ratio:.3f} | "
                f"{estimate.moment} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")


def measured_peak_bytes(config: Any, layout: Layout, *, fake: bool) -> int:
    """Return the most bytes that tensors held in the second of two training steps in one process.

    Args:
        fake: use tensors without contents, on the CPU; otherwise the current CUDA device.
    """
    device = "cpu" if fake else "cuda"
    tracker = _PeakTracker() if fake else None
    with _fake_tensors() if fake else nullcontext(), tracker or nullcontext(), torch.device(device):
        model = AutoModelForCausalLM.from_config(
            type(config).from_dict(config.to_dict()),
            dtype=layout.weight_dtype,
            attn_implementation=layout.attn_implementation,
            **({"experts_implementation": layout.experts_implementation} if hasattr(config, "num_experts") else {}),
        )
        model.train()
        if layout.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # adamw_torch works on all weights at a time on a GPU; a CPU does not by itself.
        fused = layout.optim == "adamw_torch_fused"
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused, foreach=not fused)
        tokens = torch.zeros(layout.micro_batch_size, layout.sequence_length, dtype=torch.long)
        for step in range(2):
            if step == 1:
                _reset_peak(tracker)
            for _ in range(layout.gradient_accumulation_steps):
                _forward(model, tokens, layout, device).backward()
            optimizer.step()
            optimizer.zero_grad()
    peak = tracker.peak_bytes if fake else torch.cuda.max_memory_allocated()
    del model, optimizer, tokens
    return peak


def _reset_peak(tracker: "_PeakTracker | None") -> None:
    if tracker is None:
        torch.cuda.reset_peak_memory_stats()
    else:
        tracker.peak_bytes = tracker.held_bytes


def _forward(model: torch.nn.Module, tokens: torch.Tensor, layout: Layout, device: str) -> torch.Tensor:
    """Return the loss; all else of the model's output is let go, as in a Trainer."""
    options = {"loss_chunk_tokens": layout.loss_chunk_tokens} if layout.loss_chunk_tokens else {}
    with torch.autocast(device, layout.mixed_precision, enabled=layout.mixed_precision is not None):
        # Ready-made masks, none here: fake tensors cannot be asked whether they need one.
        return model(tokens, attention_mask={"full_attention": None}, labels=tokens, use_cache=False, **options).loss


@contextmanager
def _fake_tensors() -> Iterator[None]:
    """Make tensors without contents; torch fakes `grouped_mm` in bfloat16 only."""
    grouped_mm = mock.patch("transformers.integrations.moe._grouped_mm", _fake_grouped_mm)
    with grouped_mm, FakeTensorMode(allow_non_fake_inputs=True):
        yield


def _fake_grouped_mm(rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return _FakeGroupedMM.apply(rows, weight)


class _FakeGroupedMM(torch.autograd.Function):
    """Keeps and allocates what a product of rows with the matrix of their group does."""

    @staticmethod
    def forward(ctx, rows, weight):
        rows = rows.to(weight.dtype)
        ctx.save_for_backward(rows, weight)
        return rows.new_empty(rows.shape[0], weight.shape[-1])

    @staticmethod
    def backward(ctx, gradient):
        rows, weight = ctx.saved_tensors
        return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


class _PeakTracker(TorchDispatchMode):
    """Counts the bytes of all storages that the operations inside it return, as long as they live."""

    def __init__(self):
        super().__init__()
        self.held_bytes = self.peak_bytes = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.held_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        weakref.finalize(storage, self._drop, key, num_bytes)

    def _drop(self, key: int, num_bytes: int) -> None:
        self._storages.discard(key)
        self.held_bytes -= num_bytes


if __name__ == "__main__":
    main()
