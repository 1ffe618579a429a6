"""Small dense checkpoints on disk, shaped like the real families, with a tokenizer and text of their own."""

import hashlib
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from fork_server import SERVER
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from upcycled_moe.common.tokenizers import train_tokenizer


SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}

# One of each kind of attention and embedding that the Qwen models have had.
FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2-sliding": (
        Qwen2Config,
        Qwen2ForCausalLM,
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen1.5": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 4}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
}

WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "with", "as", "have", "this", "from", "had")


def sample_text(num_words: int = 12000, seed: int = 0) -> str:
    """Return sentences of common words and numbers, the same for the same arguments."""
    chosen = random.Random(seed)
    return " ".join(
        chosen.choice(WORDS) if chosen.random() < 0.9 else str(chosen.randrange(999)) for _ in range(num_words)
    )


@cache
def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, as Qwen's is, trained on the sample text."""
    return train_tokenizer([sample_text()], SHAPE["vocab_size"])


def write_dense(
    folder: Path,
    family: str = "qwen2",
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    tokenizer: bool = True,
    seed: int = 0,
    **config_fields,
) -> Path:
    """Write a dense checkpoint into `folder` and return it; biases are not zero and norms are not one."""
    config_class, model_class, family_fields = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPE, **family_fields, **config_fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        byte_level_tokenizer().save_pretrained(folder)
    return folder


def folder_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below `folder` by its path there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def exit_status(function: Callable, *arguments) -> int:
    """Call `function` in a process of its own and return its exit status, -9 if it was killed."""
    process = SERVER.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode
