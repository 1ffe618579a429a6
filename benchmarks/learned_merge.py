"""Time and memory of a step that learns what experts count in a merge, against other steps of the same dense model.

    python benchmarks/learned_merge.py --folder /path/on/a/disk/with/1/GB [--rounds 3]

Each contestant runs in a process of its own, and they take turns:

- plain: forward, backward, and SGD of the FFNs, the leanest step that trains weights;
- learned merge: the FFNs are sums of experts in bfloat16 files, and Adam trains the coefficients;
- stacked: the same with all experts in memory, summed by autograd (`torch.func.functional_call`).

The last two must come to the same coefficients. Seconds are of the processor, which a busy machine changes less; run
with OMP_NUM_THREADS=1. Memory is the largest anonymous one; pages of files, which the system can drop at any time, are
given apart.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from measure import machine, spread
from safetensors.torch import save_file
from torch.func import functional_call
from transformers import Qwen2Config, Qwen2ForCausalLM

from upcycled_moe.common.learned_merge.coefficients import SoftmaxCoefficients
from upcycled_moe.common.learned_merge.merge import BlendGroup, LearnedMerge
from upcycled_moe.common.learned_merge.sources import Blend, StoredSource
from upcycled_moe.common.streaming.stored import StoredTensor, read_tensors


# Layers as wide as those of Qwen2.5-0.5B, and fewer of them.
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 4,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
NUM_EXPERTS, NUM_STEPS, LEARNING_RATE = 8, 4, 0.1
MATRICES = ("gate_proj", "up_proj", "down_proj")
SAMPLE_S = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to write the experts; needs 1 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-tokens", type=int, default=256, help="of a step")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder / "learned_merge_benchmark"
    if options.contestant is not None:
        print(json.dumps(measure(CONTESTANTS[options.contestant], read_tensors(folder), options.num_tokens)))
        return
    folder.mkdir(parents=True)
    try:
        write_experts(folder)
        report(compare(options.folder, options.rounds, options.num_tokens), options.num_tokens)
    finally:
        shutil.rmtree(folder)


def write_experts(folder: Path) -> None:
    """Write the FFNs of all experts: that of the dense model with noise."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{name}.{expert}": (weight + 0.01 * torch.randn(weight.shape, generator=generator)).bfloat16()
        for name, weight in dense_model().state_dict().items()
        if ".mlp." in name
        for expert in range(NUM_EXPERTS)
    }
    save_file(tensors, folder / "model.safetensors")


def compare(folder: Path, rounds: int, num_tokens: int) -> dict[str, list[dict]]:
    """Return what each contestant measured in each round."""
    results: dict[str, list[dict]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name, runs in results.items():
            command = [sys.executable, __file__, "--folder", folder, "--num-tokens", str(num_tokens)]
            ended = subprocess.run([*command, "--contestant", name], check=True, capture_output=True, text=True)
            runs.append(json.loads(ended.stdout))
    for ours, naive in zip(results["learned merge"], results["stacked"], strict=True):
        torch.testing.assert_close(ours["coefficients"], naive["coefficients"], rtol=0, atol=1e-3)
    return results


def report(results: dict[str, list[dict]], num_tokens: int) -> None:
    """Print a table in Markdown; ratios are taken round by round."""
    plain = results["plain"]
    print(f"{machine()}; {num_tokens} tokens a step, {NUM_EXPERTS} experts, {torch.get_num_threads()} threads")
    print("\n| | step, processor s | ÷ plain | peak memory, MB | ÷ plain | pages of files, MB |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, runs in results.items():
        columns = [spread([run["step_s"] for run in runs])]
        columns.append(spread([run["step_s"] / least["step_s"] for run, least in zip(runs, plain, strict=True)]))
        columns.append(f"{max(run['anonymous_mb'] for run in runs):.0f}")
        columns.append(f"{max(r['anonymous_mb'] for r in runs) / max(r['anonymous_mb'] for r in plain):.2f}")
        columns.append(f"{max(run['files_mb'] for run in runs):.0f}")
        print(f"| {name} | {' | '.join(columns)} |")


def measure(make: Callable, tensors: dict[str, StoredTensor], num_tokens: int) -> dict:
    """Return the median processor seconds of a step, the peak memory above that of the libraries, and the result."""
    tokens = torch.randint(SHAPE["vocab_size"], (1, num_tokens), generator=torch.Generator().manual_seed(0))
    with PeakMemory() as memory:
        step, coefficients = make(dense_model(), tensors, tokens)
        step()  # the first one makes room
        times = []
        for _ in range(NUM_STEPS):
            begin = time.process_time()
            step()
            times.append(time.process_time() - begin)
    return {
        "step_s": median(times),
        "anonymous_mb": memory.anonymous_mb,
        "files_mb": memory.files_mb,
        "coefficients": coefficients(),
    }


def dense_model() -> Qwen2ForCausalLM:
    """Return the dense model, of which only FFNs are trained."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    return model


def plain(model: Qwen2ForCausalLM, tensors: dict[str, StoredTensor], tokens: torch.Tensor) -> tuple:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, foreach=False)

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, list


def learned_merge(model: Qwen2ForCausalLM, tensors: dict[str, StoredTensor], tokens: torch.Tensor) -> tuple:
    groups = []
    for layer_idx in range(SHAPE["num_hidden_layers"]):
        names = [f"model.layers.{layer_idx}.mlp.{matrix}.weight" for matrix in MATRICES]
        blends = [
            Blend(name, [StoredSource(tensors[f"{name}.{expert}"]) for expert in range(NUM_EXPERTS)]) for name in names
        ]
        groups.append(BlendGroup(f"layer {layer_idx}", SoftmaxCoefficients([1] * NUM_EXPERTS), blends))
    merge = LearnedMerge(model, groups)
    optimizer = merge.attached(torch.optim.Adam(merge.parameters(), lr=LEARNING_RATE))

    def step() -> None:
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step, lambda: list(merge.values().values())


def stacked(model: Qwen2ForCausalLM, tensors: dict[str, StoredTensor], tokens: torch.Tensor) -> tuple:
    model.requires_grad_(False)
    logits = torch.zeros(SHAPE["num_hidden_layers"], NUM_EXPERTS, requires_grad=True)
    experts = {
        name: torch.stack([tensors[f"{name}.{expert}"].load().float() for expert in range(NUM_EXPERTS)])
        for name in model.state_dict()
        if ".mlp." in name
    }
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE)

    def step() -> None:
        coefficients = logits.softmax(dim=1)
        weights = {
            name: torch.tensordot(coefficients[int(name.split(".")[2])], values, 1) for name, values in experts.items()
        }
        functional_call(model, weights, (tokens,), {"labels": tokens}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: logits.softmax(dim=1).tolist()


CONTESTANTS = {"plain": plain, "learned merge": learned_merge, "stacked": stacked}


class PeakMemory:
    """Watches the memory of this process, and keeps how far it rose above where it was."""

    def __enter__(self):
        self._begin = self._now()
        self._peak = self._begin
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()
        self._thread.join()
        self.anonymous_mb, self.files_mb = (
            (peak - begin) / 1e3 for peak, begin in zip(self._peak, self._begin, strict=True)
        )

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self._peak = tuple(map(max, self._peak, self._now()))

    def _now(self) -> tuple[float, float]:
        """Return kilobytes of memory, and of pages of files."""
        lines = Path("/proc/self/status").read_text().splitlines()
        values = {name: value for name, _, value in (line.partition(":") for line in lines)}
        return tuple(int(values[name].split()[0]) * 1.024 for name in ("RssAnon", "RssFile"))


if __name__ == "__main__":
    main()
