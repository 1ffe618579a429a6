"""A few benchmark items of each task, as the offline data holds them."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet


Rows = dict[str, list[dict[str, Any]]]

MULTIPLE_CHOICE: Rows = {
    "openbookqa": [
        {"question": "There is fog around:", "choices": ["a marsh", "a tundra far away", "it", "the"], "answer": 0},
        {
            "question": "To save money is to",
            "choices": ["call", "eat lunch", "have it", "buy less of it"],
            "answer": 3,
        },
        {"question": "It was in the", "choices": ["cave", "ocean and this", "to", "with and from"], "answer": 2},
    ],
    "arc_easy": [
        {"question": "What is it for?", "choices": ["that", "life in the water", "soil"], "answer": 1},
        {"question": "Who was that?", "choices": ["this", "as", "the one", "to have it", "in"], "answer": 4},
    ],
    "arc_challenge": [{"question": "Which is it?", "choices": ["a", "the other one", "from", "had it"], "answer": 2}],
    "hellaswag": [
        {
            "question": "The girl turns on the faucet. She turns it off. the girl in Rome",
            "choices": ["was in it.", "had to.", "is for the.", "brushes this and that."],
            "answer": 3,
            "meta": {"activity_label": "Brushing teeth"},
        },
        {
            "question": "How to apply it. Apply a coat in Rome.",
            "choices": ["Let it dry.", "To this.", "It was.", "Have it as it is."],
            "answer": 0,
            "meta": {"activity_label": "Style"},
        },
    ],
    "winogrande": [
        {
            "question": "Ian had it and Craig had not because _ was in the car.",
            "choices": ["Ian", "Craig"],
            "answer": 0,
        },
        {"question": "The flour is in the bowl; the _ is too small.", "choices": ["teacup", "bowl"], "answer": 1},
    ],
    "boolq": [
        {"context": "It -- This is it.", "question": "is this it?", "choices": ["no", "yes"], "answer": 1},
        {"context": "That -- That was it.", "question": "was it this?", "choices": ["no", "yes"], "answer": 0},
    ],
    "copa": [
        {
            "question": "The woman refused it.",
            "choices": ["She was this.", "She had that for the night."],
            "answer": 1,
            "meta": {"asks_for": "cause"},
        },
        {
            "question": "The climbers had it.",
            "choices": ["They were in it.", "It was for them."],
            "answer": 0,
            "meta": {"asks_for": "effect"},
        },
    ],
}
OPEN_QA: Rows = {
    "nq_open": [{"question": "who was it", "answers": ["Carrie", "The Carrie"]}],
    "triviaqa": [{"question": "Who was in it?", "answers": ["Samuel", "Dr. Samuel"]}],
}


def write_items(folder: Path, multiple_choice: Rows | None = None, open_qa: Rows | None = None) -> Path:
    """Write the items into the files of an offline data set; a kind of which none are given has no file."""
    folder.mkdir(parents=True, exist_ok=True)
    if multiple_choice:
        rows = [
            {"context": "", **row, "task": task, "meta": json.dumps(row["meta"]) if "meta" in row else ""}
            for task, items in multiple_choice.items()
            for row in items
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "multiple_choice.parquet")
    if open_qa:
        rows = [{**row, "task": task} for task, items in open_qa.items() for row in items]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "open_qa.parquet")
    return folder
