"""A checkpoint as it was converted, and what becomes of it, as cards see it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from upcycled_moe.conversion.card import planned_checkpoint
from upcycled_moe.conversion.convert import ConversionResult, convert
from upcycled_moe.conversion.source import open_source
from upcycled_moe.model_cards.checkpoint import Checkpoint


@pytest.fixture(scope="session")
def conversion(dense, linear_recipe, tmp_path_factory) -> ConversionResult:
    """A conversion that nobody may write into."""
    return convert(open_source(str(dense())), linear_recipe(), tmp_path_factory.mktemp("moe") / "moe")


@pytest.fixture(scope="session")
def moe(conversion) -> Path:
    """The folder of it."""
    return conversion.folder


@pytest.fixture(scope="session")
def after_steps(conversion) -> Callable[..., Checkpoint]:
    """`after_steps({"command": "train", …}, num_experts=2)`: what these made of it, with changes of its config."""

    def checkpoint(*steps: dict, source: dict | None = None, **config) -> Checkpoint:
        fresh = planned_checkpoint(conversion.plan)
        provenance = {**fresh.provenance, "steps": list(steps)}
        return dataclasses.replace(
            fresh,
            config={**fresh.config, **config},
            provenance=provenance if source is None else {**provenance, "source": source},
        )

    return checkpoint
