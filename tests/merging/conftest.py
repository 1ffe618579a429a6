"""Upcycled checkpoints to merge, made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from upcycled_moe.common.moe_source import MoeSource, open_moe
from upcycled_moe.conversion.convert import convert
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.source import open_source


@pytest.fixture(scope="session")
def upcycled(dense, tmp_path_factory) -> Callable[..., tuple[Path, MoeSource]]:
    """`upcycled("qwen3", {"dtype": torch.bfloat16}, num_experts=3, …)`: a dense checkpoint, and what it became."""
    made: dict[str, tuple[Path, MoeSource]] = {}

    def make(family: str = "qwen2", dense_fields: dict | None = None, **settings) -> tuple[Path, MoeSource]:
        key = repr((family, dense_fields, settings))
        if key not in made:
            parent, out = dense(family, **(dense_fields or {})), tmp_path_factory.mktemp("upcycled") / "moe"
            convert(
                open_source(str(parent)), ConversionRecipe(**{"num_experts": 4, "router": "linear", **settings}), out
            )
            made[key] = parent, open_moe(str(out))
        return made[key]

    return make
