"""The demo's dense parent: a small Qwen2 with random weights and a tokenizer trained on the demo's text."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path


VOCAB_SIZE = 2048


def write_parent(folder: Path, text_files: Sequence[Path], seed: int = 0) -> None:
    """Write an untrained Qwen2 checkpoint: small, but with what real ones have: GQA, tied embeddings."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed
    from transformers.utils import logging

    from ..common.tokenizers import train_tokenizer

    logging.disable_progress_bar()
    tokenizer = train_tokenizer(texts_of(text_files), VOCAB_SIZE)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        dtype=torch.float32,
    )
    set_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def texts_of(files: Sequence[Path]) -> Iterator[str]:
    """Yield the texts of `files` (jsonl with a column `text`)."""
    for path in files:
        for line in path.read_text("utf-8").splitlines():
            yield json.loads(line)["text"]
