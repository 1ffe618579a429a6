"""What runs of the training script are given."""

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
