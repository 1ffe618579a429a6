"""Merged references of the rounds as checkpoints."""

import json
from types import SimpleNamespace

from accelerate import PartialState
from dense_checkpoints import write_dense

from upcycled_moe.common.progress import Progress
from upcycled_moe.train.preference import cards, references


class Warnings(Progress):
    """Keeps what it is warned of."""

    def __init__(self):
        self.messages = []

    def warn(self, message: str) -> None:
        self.messages.append(message)


def test_a_reference_is_written_without_a_card_where_that_fails(tmp_path, monkeypatch):
    def failing(folder, source):
        raise ValueError("no template")

    monkeypatch.setattr(cards, "write_card", failing)
    policies = [write_dense(tmp_path / name) for name in ("first", "second")]
    settings = SimpleNamespace(rounds=SimpleNamespace(reference="uniform", ema_decay=0.5))
    warnings = Warnings()
    references.make_reference(tmp_path / "round", policies, settings, None, None, None, PartialState(), warnings)
    assert (tmp_path / "round" / "reference" / "model.safetensors").is_file()
    assert [message.partition(": ")[2] for message in warnings.messages] == ["no card is written (no template)."]
    noted = json.loads((tmp_path / "round" / "reference.json").read_text())
    assert noted["coefficients"] == {"model": [0.5, 0.5]}
