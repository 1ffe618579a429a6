"""Tables that are no heat maps: the tokens bound to experts, and local routing consistency by length of segment."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from ..results import AnalysisReport, CheckpointResult
from .scales import format_number


@dataclass(frozen=True)
class Listing:
    """A table of text for one checkpoint.

    Args:
        title: what it lists.
        number: of the checkpoint in the report.
        name: of the checkpoint.
        is_long: whether it is shown on demand only.
    """

    title: str
    number: int
    name: str
    columns: list[str]
    rows: list[list[str]]
    is_long: bool = False


def listings(report: AnalysisReport, measure: str) -> list[Listing]:
    """Return the listings of a measure, one a checkpoint; none of most."""
    make = _LISTINGS.get(measure)
    if make is None:
        return []
    made = [
        make(number, checkpoint, checkpoint.measures[measure].tables)
        for number, checkpoint in enumerate(report.checkpoints)
        if measure in checkpoint.measures
    ]
    return [listing for listing in made if listing]


def _tokens(number: int, checkpoint: CheckpointResult, tables: dict[str, Any]) -> Listing | None:
    """Return the tokens of each expert in the last layer."""
    layers = tables.get("tokens")
    if not layers:
        return None
    rows = [[str(expert), Markup(" ").join(map(_token, tokens))] for expert, tokens in enumerate(layers[-1]) if tokens]
    return Listing(
        "Tokens bound to each expert of the last layer",
        number,
        checkpoint.name,
        ["Expert", "Tokens"],
        rows,
        is_long=True,
    )


def _token(token: dict[str, Any]) -> Markup:
    text = f"#{token['id']}" if token["token"] is None else _visible(token["token"])
    share = f"{format_number(token['share'])} of {token['occurrences']:,} occurrences"
    return Markup('<code class="token" title="{}">{}</code>').format(share, text)


def _visible(token: str) -> str:
    """Return `token` with its white space as signs, so that it can be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "∅"


def _segments(number: int, checkpoint: CheckpointResult, tables: dict[str, Any]) -> Listing | None:
    """Return means over layers by length of segment."""
    names = ("segment_lengths", "cache_sizes", "srp", "srp_by_load", "sch", "sch_by_load")
    if any(name not in tables for name in names):
        return None
    lengths, sizes, srp, srp_by_load, sch, sch_by_load = (np.array(tables[name], dtype=float) for name in names)
    columns = ["Tokens", "SRP", "by load"]
    for size in sizes:
        columns += [f"SCH, {size:.0f} experts", "by load, at most"]
    rows = []
    for at, length in enumerate(lengths):
        numbers = [srp[:, at], srp_by_load[:, at]]
        for column in range(len(sizes)):
            numbers += [sch[:, at, column], sch_by_load[:, at, column]]
        rows.append([f"{length:.0f}", *(format_number(_mean(each)) for each in numbers)])
    return Listing("Means over layers by length of segment", number, checkpoint.name, columns, rows)


def _mean(values: np.ndarray) -> float | None:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else None


_LISTINGS: dict[str, Callable[[int, CheckpointResult, dict[str, Any]], Listing | None]] = {
    "vocabulary": _tokens,
    "local_consistency": _segments,
}
