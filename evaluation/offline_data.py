"""Benchmark items of local parquet files, in the columns of the Hub's data sets, which the harness's tasks read.

`multiple_choice.parquet` has the columns `task`, `context`, `question`, `choices`, `answer` (index into `choices`) and
`meta` (JSON or empty); `open_qa.parquet` has `task`, `question` and `answers` (any is right).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
from datasets import Dataset
from pyarrow import ArrowException

from ..common.settings import SettingsError
from ..common.text import first_line


FILES = {
    "multiple_choice.parquet": ("task", "context", "question", "choices", "answer", "meta"),
    "open_qa.parquet": ("task", "question", "answers"),
}
_LABELS = "ABCDEFGHIJ"


def _science(row: dict[str, Any], question: str) -> dict[str, Any]:
    labels = list(_LABELS[: len(row["choices"])])
    choices = {"text": row["choices"], "label": labels}
    return {question: row["question"], "choices": choices, "answerKey": labels[row["answer"]]}


def _openbookqa(row: dict[str, Any]) -> dict[str, Any]:
    return _science(row, "question_stem")


def _arc(row: dict[str, Any]) -> dict[str, Any]:
    return _science(row, "question")


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    begin, stop, fragment = row["question"].rpartition(". ")
    # The beginning of the last sentence is a column of its own, which the harness writes with a capital.
    if not fragment[:1].islower():
        begin, stop, fragment = row["question"], "", ""
    return {
        "activity_label": json.loads(row["meta"])["activity_label"],
        "ctx_a": begin + stop.rstrip(),
        "ctx_b": fragment,
        "endings": row["choices"],
        "label": str(row["answer"]),
    }


def _winogrande(row: dict[str, Any]) -> dict[str, Any]:
    first, second = row["choices"]
    return {"sentence": row["question"], "option1": first, "option2": second, "answer": str(row["answer"] + 1)}


def _boolq(row: dict[str, Any]) -> dict[str, Any]:
    # The harness's prompt brings the question mark.
    return {"passage": row["context"], "question": row["question"].removesuffix("?"), "label": row["answer"]}


def _copa(row: dict[str, Any]) -> dict[str, Any]:
    first, second = row["choices"]
    asks_for = json.loads(row["meta"])["asks_for"]
    return {
        "premise": row["question"],
        "choice1": first,
        "choice2": second,
        "question": asks_for,
        "label": row["answer"],
    }


def _nq_open(row: dict[str, Any]) -> dict[str, Any]:
    return {"question": row["question"], "answer": row["answers"]}


def _triviaqa(row: dict[str, Any]) -> dict[str, Any]:
    return {"question": row["question"], "answer": {"aliases": row["answers"]}}


CONVERTERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "openbookqa": _openbookqa,
    "arc_challenge": _arc,
    "arc_easy": _arc,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "boolq": _boolq,
    "copa": _copa,
    "nq_open": _nq_open,
    "triviaqa": _triviaqa,
}


def read_offline_data(folder: Path) -> dict[str, Dataset]:
    """Return the items of each task in the parquet files of `folder`, in the columns that the harness's task reads.

    Raises:
        SettingsError: if neither file is there, or one cannot be read or lacks a column.
    """
    files = [folder / name for name in FILES if (folder / name).is_file()]
    if not files:
        raise SettingsError(f"{folder}: holds neither {' nor '.join(FILES)}; give the folder of the offline data.")
    items: dict[str, list[dict[str, Any]]] = {}
    for file in files:
        for number, row in enumerate(_rows(file)):
            if row["task"] not in CONVERTERS:
                continue
            try:
                item = CONVERTERS[row["task"]](row)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise SettingsError(
                    f"{file}: row {number} is no item of {row['task']} ({first_line(error)})."
                ) from error
            items.setdefault(row["task"], []).append(item)
    return {task: Dataset.from_list(rows) for task, rows in items.items()}


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        table = pyarrow.parquet.read_table(file)
    except (ArrowException, OSError) as error:
        raise SettingsError(f"{file}: not a readable parquet file ({first_line(error)}).") from error
    columns = FILES[file.name]
    if missing := [column for column in columns if column not in table.column_names]:
        raise SettingsError(f"{file}: no column {missing[0]!r}; it needs {', '.join(columns)}.")
    return table.select(columns).to_pylist()
