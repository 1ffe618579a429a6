"""A whole run on a laptop: train a small dense Qwen, upcycle it in two ways, train both, compare.

Every step is a command that a user would type; it is printed before it runs. Needs no network and no GPU.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from .parent import write_parent
from .report import TrainedModel, print_table, read_run, write_plots


FOLDER = Path(str(files("upcycled_moe.demo")))
TEXT = FOLDER / "text"
TRAIN_TEXT = sorted(TEXT.glob("*_train.jsonl"))
VALIDATION_TEXT = sorted(TEXT.glob("*_validation.jsonl"))
PROMPT = "Alice was"
# Tells a folder of the demo, which it may replace, from any other.
MARKER = ".upcycled_moe_demo"


class DemoError(RuntimeError):
    """A step failed."""


@dataclass(frozen=True)
class Size:
    """How much the demo trains."""

    dense_steps: int = 160
    moe_steps: int = 45
    calibration_tokens: int = 32768


def main() -> int:
    """Run the demo and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m upcycled_moe.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write (default: runs/demo)")
    parser.add_argument("--steps", type=int, help="train each model for so many steps only")
    options = parser.parse_args()
    if options.steps is not None and options.steps < 15:
        parser.error(f"--steps {options.steps}: the first evaluation is after 15 steps; train for at least as many.")
    size = Size() if options.steps is None else replace(Size(), dense_steps=options.steps, moe_steps=options.steps)
    if options.out.exists() and not (options.out / MARKER).exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} holds something else; give another folder.")
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    (options.out / MARKER).touch()
    try:
        run(options.out, size)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def run(out: Path, size: Size) -> None:
    """Run all steps, writing into `out`."""
    say("A dense Qwen2 of 3.5 million parameters, trained from scratch on three public-domain books.")
    write_parent(out / "parent", TRAIN_TEXT)
    train("dense", out / "parent", out / "dense", size.dense_steps)

    say("Upcycled: 8 experts a layer, routers from its attention heads; and the baseline, routers at random.")
    dense = str(out / "dense")
    mixture, vanilla = str(out / "mixture"), str(out / "vanilla")
    upcycled_moe("convert", dense, mixture, "--recipe", str(FOLDER / "router_upcycling.yaml"), *calibration(size))
    upcycled_moe("convert", dense, vanilla, "--recipe", str(FOLDER / "vanilla.yaml"), *calibration(size))

    say("Does the MoE compute what its parent computes?")
    upcycled_moe("verify", dense, mixture)

    say("All three train on, on the same tokens.")
    runs = {"dense": dense, "vanilla upcycling": vanilla, "Router Upcycling": mixture}
    trained = []
    for name, start in runs.items():
        folder = out / "trained" / Path(start).name
        train("continue", Path(start), folder, size.moe_steps)
        trained.append(read_run(name, folder))

    parent = read_run("dense parent", out / "dense")
    print_table(parent, trained)
    plots = write_plots(parent, trained, out / "plots")
    say("A line of the trained Router Upcycling model, folded to a linear router:")
    print(f"  {generate(trained[-1], PROMPT)}")
    say("Written:\n  " + "\n  ".join(map(str, [*plots, *(model.folder for model in trained)])))


def calibration(size: Size) -> list[str]:
    """Return the arguments that calibrate on the demo's text."""
    return ["--calibration-tokens", str(size.calibration_tokens), "--calibration-data", *map(str, TRAIN_TEXT)]


def train(config: str, start: Path, out: Path, num_steps: int) -> None:
    """Train the checkpoint `start` into `out` by one of the demo's two training configurations."""
    script = Path(str(files("upcycled_moe.train"))) / "train.py"
    log = out.with_name(f"{out.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command(
        [
            *(sys.executable, str(script), "--config", str(FOLDER / f"train_{config}.yaml")),
            *(f"model_name_or_path={start}", f"output_dir={out}", f"max_steps={num_steps}"),
            *("--train-data", *map(str, TRAIN_TEXT), "--eval-data", *map(str, VALIDATION_TEXT)),
        ],
        log,
    )
    print(log.read_text(encoding="utf-8").splitlines()[-1])


def upcycled_moe(*arguments: str) -> None:
    """Run a command of `upcycled-moe`."""
    command([sys.executable, "-m", "upcycled_moe.cli.main", *arguments])


def command(arguments: list[str], log: Path | None = None) -> None:
    """Print a command as a user would type it, and run it; with `log`, what it prints goes there.

    Raises:
        DemoError: if it fails.
    """
    shown = shlex.join(arguments).replace(f"{sys.executable} -m upcycled_moe.cli.main", "upcycled-moe")
    shown = shown.replace(sys.executable, "python").replace(f"{Path.cwd()}/", "")
    print(f"\n$ {shown}" + (f" > {log}" if log else ""), flush=True)
    if log is None:
        result = subprocess.run(arguments)
    else:
        with log.open("w", encoding="utf-8") as file:
            result = subprocess.run(arguments, stdout=file, stderr=subprocess.STDOUT)
    if result.returncode != 0:
        where = f"; see the end of {log}" if log else ""
        raise DemoError(f"the last command failed with status {result.returncode}{where}.")


def generate(model: TrainedModel, prompt: str) -> str:
    """Return how the model goes on after `prompt`, greedily."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=True)
    moe = AutoModelForCausalLM.from_pretrained(model.folder, trust_remote_code=True).fold_routers()
    inputs = tokenizer(prompt, return_tensors="pt")
    output = moe.generate(**inputs, max_new_tokens=32, do_sample=False, repetition_penalty=1.3)
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())


def say(text: str) -> None:
    """Print a line about what comes."""
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
