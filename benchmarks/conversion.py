"""Conversion of a 0.5B-shaped bfloat16 model to 8 experts, against `cat` + sync of the same bytes and mergekit-moe.

    python benchmarks/conversion.py --folder /path/on/a/disk/with/20/GB [--mergekit /path/to/mergekit-moe] [--rounds 3]

Every round runs all of them in turn and deletes what they wrote. The dense model has the shape of Qwen2.5-0.5B with
Qwen3's query and key norms: an architecture that mergekit-moe converts too, to as many bytes. mergekit-moe needs an
environment of its own (`pip install mergekit==0.1.5`).
"""

import argparse
import json
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from measure import Run, machine, run_process, spread
from shapes import QWEN2_0_5B


NUM_EXPERTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to write; needs 20 GB")
    parser.add_argument("--write-dense", type=Path, help="only write the dense model into this folder")
    parser.add_argument("--mergekit", help="path of mergekit-moe; left out if not given")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.write_dense:
        write_dense(options.write_dense)
        return
    folder = options.folder / "conversion_benchmark"
    folder.mkdir(parents=True)
    try:
        results = measure(folder, options.mergekit, options.rounds)
    finally:
        shutil.rmtree(folder)
    report(results)


def measure(folder: Path, mergekit: str | None, rounds: int) -> dict[str, list[tuple[int, Run]]]:
    """Return (bytes written, run) of each contestant in each round."""
    dense, out, log = folder / "dense", folder / "out", folder / "log"
    # In a process of its own: a child's peak memory would count what this one holds.
    subprocess.run([sys.executable, __file__, "--write-dense", str(dense)], check=True)
    contestants = {
        "upcycled-moe convert": [
            *(sys.executable, "-m", "upcycled_moe.cli.main", "convert", str(dense), str(out)),
            *("--router", "linear", "--num-experts", str(NUM_EXPERTS)),
        ],
    }
    if mergekit:
        config = folder / "mergekit.yaml"
        config.write_text(json.dumps(mergekit_config(dense)))
        contestants["mergekit-moe"] = [mergekit, str(config), str(out)]
        contestants["mergekit-moe, --lazy-unpickle --out-shard-size 500M"] = [
            *contestants["mergekit-moe"],
            "--lazy-unpickle",
            "--out-shard-size",
            "500M",
        ]
    results: dict[str, list[tuple[int, Run]]] = {}
    for _ in range(rounds):
        for name, command in contestants.items():
            run = run_process(command, log)
            weights = sorted(out.glob("*.safetensors"))
            results.setdefault(name, []).append((sum(path.stat().st_size for path in weights), run))
            if name == "upcycled-moe convert":
                # The floor: as many bytes, from as small a source, by the system's own tools.
                copy = folder / "copy"
                size = weights_bytes(dense)
                repeats, rest = divmod(results[name][-1][0], size)
                source = dense / "model.safetensors"
                script = f"(for i in $(seq {repeats}); do cat {source}; done; head -c {rest} {source}) > {copy}; "
                shutil.rmtree(out)
                floor = run_process(["sh", "-c", script + f"sync {copy}"], log)
                results.setdefault("cat + sync", []).append((copy.stat().st_size, floor))
                copy.unlink()
            else:
                shutil.rmtree(out)
    return results


def write_dense(folder: Path) -> None:
    """Write the dense model, with random weights, and a tokenizer for mergekit to copy."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from upcycled_moe.common.tokenizers import train_tokenizer
    from upcycled_moe.demo.parent import VOCAB_SIZE, texts_of

    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**QWEN2_0_5B)).to(torch.bfloat16).save_pretrained(folder)
    text_files = sorted(Path(str(files("upcycled_moe.demo")), "text").glob("*_train.jsonl"))
    train_tokenizer(texts_of(text_files), VOCAB_SIZE).save_pretrained(folder)


def weights_bytes(folder: Path) -> int:
    """Return the bytes of all weight files in `folder`."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def mergekit_config(dense: Path) -> dict:
    """Return the configuration with which mergekit-moe does the same: equal experts, routers at random."""
    experts = [{"source_model": str(dense), "positive_prompts": [""]} for _ in range(NUM_EXPERTS)]
    return {"base_model": str(dense), "gate_mode": "random", "dtype": "bfloat16", "experts": experts}


def report(results: dict[str, list[tuple[int, Run]]]) -> None:
    """Print a table in Markdown."""
    print(machine())
    print("\n| | GB | wall s | GB/s | peak memory, MB | ÷ cat + sync |\n|---|---:|---:|---:|---:|---:|")
    floors = [run.wall_s for _, run in results["cat + sync"]]
    for name, runs in results.items():
        rates = [num_bytes / run.wall_s / 1e9 for num_bytes, run in runs]
        ratios = [run.wall_s / floor for (_, run), floor in zip(runs, floors, strict=True)]
        peak = max(run.peak_memory_bytes for _, run in runs) / 1e6
        walls = spread([run.wall_s for _, run in runs])
        print(f"| {name} | {runs[0][0] / 1e9:.2f} | {walls} | {spread(rates)} | {peak:.0f} | {spread(ratios)} |")


if __name__ == "__main__":
    main()
