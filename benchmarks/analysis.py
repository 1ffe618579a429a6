"""Cost of an analysis against a plain forward pass over the same tokens, and which measures it goes to.

    python benchmarks/analysis.py [--tokens 65536] [--rounds 3]

A small model, for which measures cost most against the pass. Both run without the output head, in the same batches;
loading, tokenizing and the report are left out. What is computed once, and for a bounded number of tokens, weighs less
the more tokens there are: 65536 is what the command reads of a domain by default. On a CPU give OMP_NUM_THREADS=1.
"""

import argparse
import time
from collections import defaultdict
from statistics import median

import torch
from measure import machine, spread
from shapes import SMALL

from modeling_upcycled_moe import UpcycledQwenMoeConfig, UpcycledQwenMoeForCausalLM
from upcycled_moe.analysis.measures import MEASURES, Measure, Subject
from upcycled_moe.analysis.settings import AnalysisSettings
from upcycled_moe.common.devices import best_device
from upcycled_moe.common.moe_layers import find_moe_layers
from upcycled_moe.common.routing_pass import run_pass


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": SMALL["intermediate_size"]}
BLOCK_SIZE = 512
BATCH_SIZE = AnalysisSettings(data=[]).batch_size


class Timed:
    """A measure whose time is added up."""

    def __init__(self, measure: Measure, seconds: dict[str, float]):
        self.measure = measure
        self.seconds = seconds

    def update(self, *arguments) -> None:
        self._time(self.measure.update, *arguments)

    def result(self) -> None:
        self._time(self.measure.result)

    def _time(self, function, *arguments) -> None:
        begin = now()
        function(*arguments)
        self.seconds[self.measure.name] += now() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = UpcycledQwenMoeForCausalLM(UpcycledQwenMoeConfig(**SMALL, **EXPERTS)).eval().to(best_device())
    tokens = torch.randint(SMALL["vocab_size"], (options.tokens // BLOCK_SIZE, BLOCK_SIZE)).tolist()
    blocks = [{"input_ids": block, "position_ids": list(range(BLOCK_SIZE))} for block in tokens]
    compare(model, blocks, options.rounds)


@torch.inference_mode()
def compare(model: UpcycledQwenMoeForCausalLM, blocks: list[dict[str, list[int]]], rounds: int) -> None:
    """Print a table in Markdown."""
    plain_s, ratios, shares = [], [], defaultdict(list)
    run_pass(model, [], {"text": blocks[:BATCH_SIZE]}, [], BATCH_SIZE)
    for _ in range(rounds):
        plain_s.append(seconds_of(model, blocks, []))
        ratios.append(seconds_of(model, blocks, new_measures(model)) / plain_s[-1])
        seconds: dict[str, float] = defaultdict(float)
        seconds_of(model, blocks, [Timed(measure, seconds) for measure in new_measures(model)])
        for name, second in seconds.items():
            shares[name].append(100 * second / plain_s[-1])
    num_tokens = len(blocks) * BLOCK_SIZE
    print(f"{machine()} on {model.device}, {num_tokens} tokens")
    print(f"\nplain forward pass: {spread([num_tokens / second for second in plain_s])} tokens/s")
    print(f"analysis ÷ plain: {spread(ratios)}")
    print("\n| measure | % of a plain pass |\n|---|---:|")
    for name, values in sorted(shares.items(), key=lambda share: -median(share[1])):
        print(f"| `{name}` | {spread(values)} |")


def new_measures(model: UpcycledQwenMoeForCausalLM) -> list[Measure]:
    subject = Subject(find_moe_layers(model), ["text"], model.device)
    return [measure(subject) for measure in MEASURES]


def seconds_of(model: UpcycledQwenMoeForCausalLM, blocks: list[dict[str, list[int]]], measures: list) -> float:
    begin = now()
    run_pass(model, find_moe_layers(model) if measures else [], {"text": blocks}, measures, BATCH_SIZE)
    for measure in measures:
        measure.result()
    return now() - begin


def now() -> float:
    """Return seconds: of the clock with an accelerator, else of the processor, which other work does not lengthen."""
    if not torch.accelerator.is_available():
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
