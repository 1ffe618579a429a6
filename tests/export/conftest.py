"""Upcycled checkpoints of every kind that a stock architecture can hold, and what their exports compute."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense_checkpoints import byte_level_tokenizer
from moe_checkpoints import zero_attention_biases

from upcycled_moe.common.moe_source import MoeSource, open_moe


@pytest.fixture
def write_moe(make_moe, tmp_path) -> Callable[..., MoeSource]:
    """`write_moe(zero_biases=True, dtype=torch.bfloat16, tokenizer=True, **config_fields)`: an opened checkpoint."""

    def write(*, zero_biases: bool = False, dtype=torch.float32, tokenizer: bool = False, **arguments) -> MoeSource:
        folder = tmp_path / "moe"
        model = make_moe(**arguments)
        if zero_biases:
            zero_attention_biases(model)
        model.to(dtype).save_pretrained(folder)
        if tokenizer:
            byte_level_tokenizer().save_pretrained(folder)
        return open_moe(str(folder))

    return write


@pytest.fixture
def out(tmp_path) -> Path:
    """The folder to write to."""
    return tmp_path / "out"
