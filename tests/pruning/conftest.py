"""Text with a split for the scores and one for the loss; nobody may write into it."""

import shutil

import pytest
from moe_checkpoints import DOMAINS, write_text


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """The models are small, and all that a process of tests holds takes a third of a second to go through."""
    monkeypatch.setattr("upcycled_moe.pruning.prune.free_memory", lambda: None)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Folder with train and validation text of three domains, which are not the same."""
    folder = write_text(tmp_path_factory.mktemp("text") / "text")
    more = write_text(tmp_path_factory.mktemp("text") / "more", num_documents=24)
    for domain in DOMAINS:
        lines = (more / domain / "validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / domain / "train.jsonl").write_text("".join(lines[12:]), encoding="utf-8")
    shutil.rmtree(more)
    return folder
