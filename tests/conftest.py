"""Tiny models that all tests share. Their logits are of order one, so that absolute differences mean something."""

import os


# Before Transformers is imported: nothing here may ask the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from modeling_upcycled_moe import UpcycledQwenMoeConfig, UpcycledQwenMoeForCausalLM


TINY_SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE_CLASSES = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


@pytest.fixture(autouse=True)
def _transformers_logging():
    """Commands that run in this process quieten Transformers; the next test finds it as it was."""
    verbosity, has_progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    (logging.enable_progress_bar if has_progress_bar else logging.disable_progress_bar)()


def randomize_(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Move every parameter off the values that a fresh model has: biases are not zero, norms are not one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.05)
    return model


@pytest.fixture
def make_dense():
    """`make_dense("qwen2", **config_fields)`: a dense Qwen in evaluation mode, the same for the same arguments."""

    def make(family: str = "qwen2", seed: int = 0, **config_fields):
        config_class, model_class = DENSE_CLASSES[family]
        config_fields = {**TINY_SHAPE, **({"head_dim": 16} if family == "qwen3" else {}), **config_fields}
        torch.manual_seed(seed)
        return randomize_(model_class(config_class(**config_fields)), seed).eval()

    return make


@pytest.fixture
def make_moe():
    """`make_moe(**config_fields)`: a Mixture-of-Experts model in evaluation mode, the same for the same arguments."""

    def make(model_class=UpcycledQwenMoeForCausalLM, seed: int = 0, **config_fields):
        config = UpcycledQwenMoeConfig(
            **{**TINY_SHAPE, "num_experts": 4, "moe_intermediate_size": 32, **config_fields}
        )
        torch.manual_seed(seed)
        return randomize_(model_class(config), seed).eval()

    return make


@pytest.fixture
def make_tokens():
    """`make_tokens(batch, length)`: random token ids without special tokens."""

    def make(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, TINY_SHAPE["vocab_size"], (batch, length), generator=generator)

    return make
