"""The demo's dense parent: a small Qwen2 with random weights and a tokenizer trained on the demo's text."""

import json
from collections.abc import Sequence
from pathlib import Path


VOCAB_SIZE = 2048
END_OF_TEXT = "<|endoftext|>"


def write_parent(folder: Path, text_files: Sequence[Path], seed: int = 0) -> None:
    """Write an untrained Qwen2 checkpoint: small, but with what real ones have: GQA, tied embeddings."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = train_tokenizer(text_files)
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


def train_tokenizer(text_files: Sequence[Path]):
    """Return a byte-level BPE tokenizer, Qwen's kind, trained on `text_files` (jsonl with a column `text`)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = (json.loads(line)["text"] for path in text_files for line in path.read_text("utf-8").splitlines())
    tokenizer.train_from_iterator(rows, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)
