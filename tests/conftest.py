"""Tiny models that all tests share. Their logits are of order one, so that absolute differences mean something."""

import os
from collections.abc import Callable
from pathlib import Path


# Before Transformers is imported: nothing here may ask the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from dense_checkpoints import sample_text, write_dense
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging
from warm_python import WarmPython

from modeling_upcycled_moe import UpcycledQwenMoeConfig, UpcycledQwenMoeForCausalLM
from upcycled_moe.conversion.recipe import ConversionRecipe


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


@pytest.fixture(scope="session")
def warm_python():
    """`warm_python.run("print(1)", …)`: run a program in a process of its own that has the large imports behind it."""
    with WarmPython(os.environ) as server:
        yield server


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


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Callable[..., Path]:
    """`dense("qwen3", dtype=torch.bfloat16, …)`: folder of a dense checkpoint, written once for the same arguments."""
    written: dict[tuple, Path] = {}

    def folder(family: str = "qwen2", **arguments) -> Path:
        key = (family, *sorted(arguments.items(), key=str))
        if key not in written:
            written[key] = write_dense(tmp_path_factory.mktemp("dense"), family, **arguments)
        return written[key]

    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A text file of some 30,000 tokens."""
    path = tmp_path_factory.mktemp("text") / "sample.txt"
    path.write_text(sample_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def mixture_recipe(text_file) -> Callable[..., ConversionRecipe]:
    """`mixture_recipe(num_experts=8, …)`: a recipe that calibrates on 512 tokens, in batches of 3, 3 and 2 blocks."""

    def recipe(**settings) -> ConversionRecipe:
        return ConversionRecipe(
            **{
                "num_experts": 4,
                "calibration_data": [str(text_file)],
                "calibration_tokens": 512,
                "calibration_block_size": 64,
                "calibration_batch_size": 3,
                **settings,
            }
        )

    return recipe


@pytest.fixture(scope="session")
def linear_recipe() -> Callable[..., ConversionRecipe]:
    """`linear_recipe(seed=1, …)`: a recipe that needs no text."""

    def recipe(**settings) -> ConversionRecipe:
        return ConversionRecipe(**{"num_experts": 4, "router": "linear", **settings})

    return recipe
