"""Export and merge of a 0.5B-shaped bfloat16 model with 8 experts, against `cat` of the same bytes.

    python benchmarks/export.py --folder /path/on/a/disk/with/15/GB [--rounds 3]

Every round runs all of them in turn and deletes what they wrote. An export is held against writing as many bytes
(`cat` + sync), a merge, which computes its means in float64 and writes an eighth, against reading them (`cat` to
/dev/null). The dense parent is that of conversion.py; its experts have noise, or they would all be one.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from measure import Run, machine, run_process, spread

from conversion import NUM_EXPERTS, weights_bytes


# -P: the code beside a checkpoint in the current folder is not taken for the package's.
UPCYCLED_MOE = [sys.executable, "-P", "-m", "upcycled_moe.cli.main"]
# Each contestant, and the one that it is held against.
FLOORS = {"upcycled-moe export": "cat + sync", "upcycled-moe merge": "cat to /dev/null"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where to write; needs 15 GB")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder / "export_benchmark"
    folder.mkdir(parents=True)
    try:
        num_bytes, results = measure(folder, options.rounds)
    finally:
        shutil.rmtree(folder)
    report(num_bytes, results)


def measure(folder: Path, rounds: int) -> tuple[int, dict[str, list[Run]]]:
    """Return the bytes of the model's weights, and what each contestant took in each round."""
    moe, out, copy, log = (folder / name for name in ("moe", "out", "copy", "log"))
    write_moe(folder / "dense", moe)
    files = " ".join(str(path) for path in sorted(moe.glob("*.safetensors")))
    contestants = {
        "upcycled-moe export": [*UPCYCLED_MOE, "export", str(moe), str(out), "--to", "qwen3_moe"],
        "cat + sync": ["sh", "-c", f"cat {files} > {copy}; sync {copy}"],
        "upcycled-moe merge": [*UPCYCLED_MOE, "merge", str(moe), str(out), "--method", "average"],
        "cat to /dev/null": ["sh", "-c", f"cat {files} > /dev/null"],
    }
    results: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, command in contestants.items():
            results[name].append(run_process(command, log))
            shutil.rmtree(out, ignore_errors=True)
            copy.unlink(missing_ok=True)
    return weights_bytes(moe), results


def write_moe(dense: Path, moe: Path) -> None:
    """Write the dense parent, and the model with experts."""
    # In processes of their own: a child's peak memory would count what this one holds.
    subprocess.run([sys.executable, Path(__file__).with_name("conversion.py"), "--write-dense", dense], check=True)
    command = [*UPCYCLED_MOE, "convert", dense, moe, "--num-experts", str(NUM_EXPERTS)]
    subprocess.run([*command, "--router", "linear", "--experts", "noise"], check=True, stdout=subprocess.DEVNULL)


def report(num_bytes: int, results: dict[str, list[Run]]) -> None:
    """Print a table in Markdown."""
    print(f"{machine()}, {num_bytes / 1e9:.2f} GB of weights")
    print("\n| | wall s | processor s | GB/s | peak memory, MB | ÷ cat |\n|---|---:|---:|---:|---:|---:|")
    for name, runs in results.items():
        floor = results[FLOORS.get(name, name)]
        ratios = [run.wall_s / least.wall_s for run, least in zip(runs, floor, strict=True)]
        rates = [num_bytes / run.wall_s / 1e9 for run in runs]
        peak = max(run.peak_memory_bytes for run in runs) / 1e6
        seconds = f"{spread([run.wall_s for run in runs])} | {spread([run.cpu_s for run in runs])}"
        print(f"| {name} | {seconds} | {spread(rates)} | {peak:.0f} | {spread(ratios)} |")


if __name__ == "__main__":
    main()
