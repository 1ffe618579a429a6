"""The file with the routing of a run: a JSON line for each log, too wide for the log of scalars.

A line is `{"step": 10, "num_tokens": 40960, "layers": {"1": {"load": [0.25, ...], "entropy": 1.2, ...}, ...}}`: the
step, the tokens since the line before, and the figures of `common/routing.py` of each MoE layer, by its index in the
model. What is not a number is null.
"""

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import replacing


ROUTING_LOG_FILE = "routing.jsonl"


def append_routing(path: Path, step: int, num_tokens: int, layers: Mapping[int, Mapping[str, Any]]) -> None:
    """Add a line to the file; one that finds no room leaves the file as it was.

    Raises:
        OSError: if it cannot be written.
    """
    entry = {
        "step": step,
        "num_tokens": num_tokens,
        "layers": {str(layer): {name: _shown(value) for name, value in layers[layer].items()} for layer in layers},
    }
    line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return [_shown(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_routing(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of the file, which need not be there; a last one that was cut short is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def cut_routing(path: Path, last_step: int) -> None:
    """Remove the lines after `last_step`, from which a run goes on; after 0 the file."""
    if last_step == 0:
        path.unlink(missing_ok=True)
    elif path.is_file():
        with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
            for entry in read_routing(path):
                if entry["step"] <= last_step:
                    file.write(json.dumps(entry, separators=(",", ":")) + "\n")
