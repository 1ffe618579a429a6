"""A Hub that runs here, and a checkpoint for it."""

import pytest
from hub_stand_in import HubStandIn, running_hub
from pushed_checkpoints import write_pushable


@pytest.fixture
def hub(monkeypatch) -> HubStandIn:
    """A stand-in for the Hub, which this process takes for the Hub."""
    with running_hub(monkeypatch) as server:
        yield server


@pytest.fixture(scope="session")
def pushed_checkpoint(tmp_path_factory):
    """A checkpoint to push; nobody may write into it."""
    return write_pushable(tmp_path_factory.mktemp("pushed") / "moe")
