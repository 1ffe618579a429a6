"""Checkpoints and text that the converter's tests share; nobody may write into them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dense_checkpoints import sample_text, write_dense

from upcycled_moe.conversion.recipe import ConversionRecipe


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


@pytest.fixture
def tokens() -> torch.Tensor:
    """Random tokens [2, 48], longer than the sliding window."""
    return torch.randint(1, 320, (2, 48), generator=torch.Generator().manual_seed(1))
