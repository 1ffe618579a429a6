"""The table of samples with all scores, kept in a file: what is scored once is not scored again."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..common.files import replacing
from .samples import METADATA, SampleTable, table_facts


TABLE_FILE = "scores.parquet"

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


class ScoreTable:
    """A table of samples, and scores of its responses by what they were made with.

    Args:
        path: the file; each new score rewrites it, whole or not at all.
        earlier: files that may be such tables; scores of the same samples are taken from them.
    """

    def __init__(self, samples: SampleTable, path: Path, earlier: Iterable[Path] = ()):
        self.samples = samples
        self._path = path
        self._facts: dict[str, dict[str, Any]] = {}
        self._scores: dict[str, np.ndarray] = {}
        for file in earlier:
            self._take(file)
        self._write()

    @staticmethod
    def column(facts: dict[str, Any]) -> str:
        """Return the name of the column of scores made with `facts`, which fit in JSON."""
        return "score_" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    def get(self, facts: dict[str, Any]) -> np.ndarray | None:
        """Return the scores [P, N] that were made with `facts`, None if there are none yet."""
        return self._scores.get(self.column(facts))

    def add(self, facts: dict[str, Any], scores: np.ndarray) -> None:
        """Keep the `scores` [P, N], made with `facts`, here and in the file."""
        self._facts[self.column(facts)] = facts
        self._scores[self.column(facts)] = scores
        self._write()

    def _take(self, file: Path) -> None:
        facts = table_facts(file)
        if facts is None or facts["sha256"] != self.samples.sha256:
            return
        table = pq.read_table(file, columns=list(facts["scores"]))
        self._facts |= facts["scores"]
        self._scores |= {name: np.array(table.column(name).to_pylist()) for name in facts["scores"]}

    def _write(self) -> None:
        columns = {
            "prompt": pa.array(self.samples.prompts, _MESSAGES),
            "responses": pa.array(self.samples.responses, pa.list_(pa.string())),
            **{name: pa.array(scores.tolist()) for name, scores in (self.samples.columns | self._scores).items()},
        }
        facts = {"sha256": self.samples.sha256, "origin": self.samples.origin, "scores": self._facts}
        table = pa.table(columns).replace_schema_metadata({METADATA: json.dumps(facts).encode()})
        with replacing(self._path) as partial:
            pq.write_table(table, partial)
