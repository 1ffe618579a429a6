"""Throughput of calibration against a plain forward pass of the dense model, on the same tokens in the same batches.

    python benchmarks/calibration.py [--layers 24] [--tokens 16384] [--rounds 3]

The plain pass is the model without its output head, which calibration does not need either: with it the comparison
would flatter calibration.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from measure import machine, spread
from shapes import QWEN2_0_5B
from transformers import AutoModel, Qwen2Config, Qwen2ForCausalLM

from upcycled_moe.common.devices import best_device
from upcycled_moe.conversion.calibration import calibrate, compute_dtype
from upcycled_moe.conversion.source import open_source


BLOCK_SIZE = 1024
BATCH_SIZE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Qwen2Config(**(QWEN2_0_5B | {"num_hidden_layers": options.layers}))
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        measure(Path(folder), options.tokens, options.rounds)


def measure(folder: Path, num_tokens: int, rounds: int) -> None:
    """Print a table in Markdown."""
    source, device = open_source(str(folder)), best_device()
    blocks = torch.randint(source.config.vocab_size, (num_tokens // BLOCK_SIZE, BLOCK_SIZE))
    model = AutoModel.from_pretrained(folder, dtype=compute_dtype(source, device)).eval().to(device)

    @torch.no_grad()
    def plain() -> None:
        for batch in blocks.split(BATCH_SIZE):
            model(batch.to(device), use_cache=False)

    def calibration(attended: bool) -> None:
        layers = range(source.config.num_hidden_layers)
        for _ in calibrate(source, blocks, layers, attended=attended, batch_size=BATCH_SIZE, device=device):
            pass

    contestants = {
        "plain forward pass": plain,
        "calibration, mean keys": lambda: calibration(False),
        "calibration, attended keys": lambda: calibration(True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    plain()
    for _ in range(rounds):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    print(machine(), f"on {device}")
    print("\n| | tokens/s | throughput ÷ plain |\n|---|---:|---:|")
    for name, times in seconds.items():
        ratios = [base / own for base, own in zip(seconds["plain forward pass"], times, strict=True)]
        print(f"| {name} | {spread([num_tokens / own for own in times])} | {spread(ratios)} |")


if __name__ == "__main__":
    main()
