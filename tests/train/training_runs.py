"""Running the training script, in this process or in others."""

import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path


ROOT = Path(__file__).parents[2]
TEXT = Path(str(files("upcycled_moe.demo"))) / "text"
TRAIN_SCRIPT = ROOT / "train" / "train.py"
SHAPE = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def command_line(settings: dict) -> list[str]:
    """Return `settings` as arguments of the script."""
    lists = {
        name: "[" + ", ".join(map(str, value)) + "]" for name, value in settings.items() if isinstance(value, list)
    }
    return [f"{name}={value}" for name, value in {**settings, **lists}.items()]


def run_script(settings: dict, *, num_processes: int | None = None, script=TRAIN_SCRIPT, **environment: str):
    """Run the script in processes of its own, with torchrun if their number is given."""
    launcher = [sys.executable]
    if num_processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    return subprocess.run(
        [*launcher, str(script), *command_line(settings)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
    )
