from functools import cache

import pytest
from moe_checkpoints import write_checkpoint, write_text


@pytest.fixture(scope="session")
def labelled_text(tmp_path_factory):
    """A folder with text of three domains; no test writes into it."""
    return write_text(tmp_path_factory.mktemp("labelled") / "text")


@pytest.fixture(scope="session")
def moe_checkpoint(tmp_path_factory):
    """`moe_checkpoint("mixtral", seed)`: folder of such a checkpoint; no test writes into it."""

    @cache
    def make(kind, seed=0):
        return write_checkpoint(tmp_path_factory.mktemp("moe") / f"{kind.replace(' ', '_')}_{seed}", kind, seed)

    return make
