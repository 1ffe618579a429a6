"""What the reader of an evaluation must know, in sentences."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .results import CheckpointResult


if TYPE_CHECKING:
    from .harness import HarnessTasks


def report_notes(
    results: Sequence[CheckpointResult], tasks: "HarnessTasks | None", limit: int | None, missing: Sequence[str]
) -> list[str]:
    """Return the notes on `results`.

    Args:
        limit: items of each task; None for all.
        missing: names of the checkpoints that are not evaluated yet.
    """
    notes = [f"Incomplete: {', '.join(missing)} not evaluated."] if missing else []
    if tasks is not None:
        notes += _notes_on_tasks(tasks, limit)
    notes += [
        f"Prompts longer than the positions of {names}, cut from the left: {cut}."
        for cut, names in _names_by(results, _shown_truncated).items()
    ]
    alone = ", ".join(result.name for result in results if result.documents_alone)
    if alone:
        notes.append(
            f"Perplexity of {alone}: documents were read one at a time, as the model does not tell those of a block "
            "apart."
        )
    if len({result.tokenizer for result in results}) > 1:
        notes.append("Tokenizers differ: the same text is other tokens; compare bits per byte, not perplexity.")
    return notes


def _notes_on_tasks(tasks: "HarnessTasks", limit: int | None) -> list[str]:
    notes = []
    if limit is not None:
        notes.append(f"A quick look: the first {limit} items of each task only.")
    if tasks.offline:
        notes.append(
            "Offline data: may be samples of the sets, scored as the harness scores the whole ones; not to be "
            "compared with published figures."
        )
    if tasks.left_out:
        notes.append(f"Not in the offline data, and in no average: {', '.join(tasks.left_out)}.")
    return notes


def _shown_truncated(result: CheckpointResult) -> str:
    return ", ".join(f"{count} of {name}" for name, count in sorted(result.num_truncated.items()))


def _names_by(results: Sequence[CheckpointResult], key: Callable[[CheckpointResult], str]) -> dict[str, str]:
    """Return the names of the results by their `key`, those without one left out."""
    names: dict[str, list[str]] = {}
    for result in results:
        if said := key(result):
            names.setdefault(said, []).append(result.name)
    return {said: ", ".join(those) for said, those in names.items()}
