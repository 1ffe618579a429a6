"""A dense checkpoint and benchmark items; nobody may write into them."""

import pytest
from benchmark_items import MULTIPLE_CHOICE, OPEN_QA, write_items
from dense_checkpoints import write_dense

from upcycled_moe.common.checkpoints import load_config, load_model, load_tokenizer


@pytest.fixture(scope="session")
def dense(tmp_path_factory):
    """Folder of a dense Qwen2 checkpoint."""
    return write_dense(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def items(tmp_path_factory):
    """Folder of an offline data set."""
    return write_items(tmp_path_factory.mktemp("items"), MULTIPLE_CHOICE, OPEN_QA)


@pytest.fixture(scope="session")
def model(dense):
    """The dense model."""
    return load_model(str(dense), load_config(str(dense)), dtype="auto", device="cpu")


@pytest.fixture(scope="session")
def tokenizer(dense):
    """Its tokenizer."""
    return load_tokenizer(str(dense))
