"""lm-evaluation-harness as a library: its tasks, with data of the Hub or of local files, and its scores of a model."""

import contextlib
import io
import logging
import math
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from huggingface_hub.errors import LocalEntryNotFoundError
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate

from ..common.settings import SettingsError
from ..common.text import first_line
from .language_model import LanguageModel
from .offline_data import read_offline_data
from .results import Score, TaskInfo
from .tasks import ACCURACIES, PAPER_GROUP, PAPER_TASKS, headline_metric


OWN_TASKS = Path(__file__).parent / "harness_tasks"
# Where the harness keeps the paper's tasks: an index of these takes no time, one of all its tasks ten seconds.
_PAPER_TASK_FOLDERS = (
    "openbookqa", "arc", "hellaswag", "winogrande", "super_glue/boolq", "super_glue/copa", "nq_open", "triviaqa"
)  # fmt: skip

# Right answers of the paper's open questions. They are short, but a weak model never comes to a stop sign: what is
# twice as long as the longest of them is wrong either way, and need not be written to the harness's 256 tokens.
_RIGHT_ANSWERS: dict[str, Callable[[Mapping[str, Any]], Sequence[str]]] = {
    "nq_open": lambda item: item["answer"],
    "triviaqa": lambda item: item["answer"]["aliases"],
}

_UNREACHABLE = (ConnectionError, TimeoutError, socket.gaierror, LocalEntryNotFoundError)

logging.getLogger("lm_eval").setLevel(logging.ERROR)


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks with their data, ready for any number of models.

    Args:
        tasks: by name, in order.
        groups: of the harness, whose figures it computes itself.
        left_out: tasks of the paper whose data is not there.
    """

    tasks: dict[str, Task]
    groups: dict[str, Group]
    offline: bool
    left_out: tuple[str, ...] = ()


def load_tasks(names: Sequence[str], offline_data: Path | None = None) -> HarnessTasks:
    """Return the tasks, groups and tags `names` of the harness, or `router_upcycling`, with their data.

    Args:
        offline_data: folder to read the data of the paper's tasks from, instead of the Hub.

    Raises:
        SettingsError: if there is no such task, or its data cannot be had.
    """
    if offline_data is not None:
        loaded, left_out = _load_offline(names, offline_data)
    else:
        loaded, left_out = _load_from_hub(names), ()
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(0)
    return HarnessTasks(loaded["tasks"], loaded["groups"], offline_data is not None, left_out)


def _load_from_hub(names: Sequence[str]) -> dict[str, Any]:
    own_names = {PAPER_GROUP, *PAPER_TASKS}
    # A tag has more tasks than those of the paper.
    is_paper_alone = own_names.issuperset(names)
    manager = _task_manager() if is_paper_alone else lm_eval.tasks.TaskManager(include_path=OWN_TASKS)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    for name in names:
        if name not in manager.all_tasks:
            similar = get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {similar[0]!r}?" if similar else "`lm-eval ls tasks` lists them."
            raise SettingsError(f"{name}: no such task in lm-evaluation-harness; {hint}")
        try:
            found = manager.load([name])
        # Data sets and tasks with code of their own raise whatever they like.
        except Exception as error:
            reason = f"({type(error).__name__}: {first_line(error)})"
            if not _is_unreachable(error):
                raise SettingsError(f"{name}: this task cannot be loaded {reason}.") from error
            way_out = "; without the Hub, give local files with --offline-data" if name in own_names else ""
            raise SettingsError(f"{name}: the data of this task cannot be reached {reason}{way_out}.") from error
        for part in loaded:
            loaded[part] |= found[part]
    return loaded


def _is_unreachable(error: BaseException | None) -> bool:
    """Return whether `error`, or what it came of, is that another machine could not be reached."""
    while error is not None:
        if isinstance(error, _UNREACHABLE):
            return True
        error = error.__cause__ or error.__context__
    return False


def _load_offline(names: Sequence[str], folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    data = read_offline_data(folder)
    wanted: dict[str, None] = {}
    for name in names:
        if name == PAPER_GROUP:
            wanted |= dict.fromkeys(task for task in PAPER_TASKS if task in data)
        elif name in data:
            wanted[name] = None
        else:
            raise SettingsError(f"{name}: not in the offline data of {folder}; there are {', '.join(data)}.")
    members = [{"task": name, "custom_dataset": _reader(data[name])} for name in wanted]
    loaded = _task_manager().load([{"group": PAPER_GROUP, "task": members}])
    left_out = tuple(task for task in PAPER_TASKS if task not in data) if PAPER_GROUP in names else ()
    return loaded, left_out


def _task_manager() -> lm_eval.tasks.TaskManager:
    """Return an index of the paper's tasks."""
    folder = Path(lm_eval.tasks.__file__).parent
    paths = [OWN_TASKS, *(folder / name for name in _PAPER_TASK_FOLDERS)]
    return lm_eval.tasks.TaskManager(include_path=paths, include_defaults=False)


def _reader(data: Dataset) -> Callable[..., dict[str, Dataset]]:
    # Whichever split a task evaluates: the items are of that one.
    return lambda **_: dict.fromkeys(("train", "validation", "test"), data)


def score_tasks(
    model: LanguageModel, tasks: HarnessTasks, limit: int | None = None
) -> tuple[dict[str, dict[str, Score]], dict[str, TaskInfo], dict[str, list[float]]]:
    """Return all figures of each task, and of each group that has any, what is known of it, and its items' accuracies.

    Args:
        limit: items of each task, the first ones; by default all.

    Raises:
        SettingsError: if an item does not fit into the model, or a figure is not finite.
    """
    _limit_short_answers(model, tasks, limit)
    # The harness prints how it finds a batch size, where results go.
    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluate(model, {"tasks": tasks.tasks, "groups": tasks.groups}, limit=limit, log_samples=True)
    scores = {}
    for name, metrics in found["results"].items():
        if read := _read_scores(metrics):
            _check_finite(model.name, name, read)
            scores[name] = read
    infos = {name: _task_info(name, scores[name], tasks, found, limit) for name in scores}
    items = {name: _item_scores(found["samples"].get(name, []), info.metric) for name, info in infos.items()}
    return scores, infos, items


def _limit_short_answers(model: LanguageModel, tasks: HarnessTasks, limit: int | None) -> None:
    """Let the model write twice as much as the longest right answer in its own tokens, or what the harness allows."""
    for name, right_answers in _RIGHT_ANSWERS.items():
        if name not in tasks.tasks:
            continue
        task = tasks.tasks[name]
        answers = [answer for _, item in task.doc_iterator(limit=limit) for answer in right_answers(item)]
        longest = max(map(len, model.tokenizer(answers, add_special_tokens=False)["input_ids"]))
        num_tokens = min(2 * longest, model.max_gen_toks)
        task.set_config(key="generation_kwargs", value={"max_gen_toks": num_tokens}, update=True)


def _check_finite(model_name: str, task: str, scores: Mapping[str, Score]) -> None:
    for metric, score in scores.items():
        if not math.isfinite(score.value):
            raise SettingsError(f"{model_name}: {metric} of {task} is not finite ({score.value}); leave the task out.")


def _item_scores(samples: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """Return the accuracy of each item, in order; none where `metric` is no accuracy of single items."""
    # A task may read answers in several ways; the first is what it is quoted by.
    read = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    if metric not in ACCURACIES or any(metric not in sample for sample in read):
        return []
    return [float(sample[metric]) for sample in sorted(read, key=lambda sample: sample["doc_id"])]


def _read_scores(metrics: Mapping[str, Any]) -> dict[str, Score]:
    """Return the figures from the harness's `{"acc,none": …, "acc_stderr,none": …}`."""
    scores = {}
    for key, value in metrics.items():
        metric, comma, answer_filter = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = metrics.get(f"{metric}_stderr,{answer_filter}")
        # A task may read answers in several ways; the first is what it is quoted by.
        name = metric if metric not in scores else key
        scores[name] = Score(float(value), _standard_error(error))
    return scores


def _standard_error(error: float | str | None) -> float | None:
    # The harness writes "N/A".
    return None if error is None or isinstance(error, str) or not math.isfinite(error) else float(error)


def _task_info(
    name: str, scores: Mapping[str, Score], tasks: HarnessTasks, found: Mapping[str, Any], limit: int | None
) -> TaskInfo:
    version = found["versions"].get(name)
    counts = found["n-samples"].get(name, {"effective": 0, "original": 0})
    return TaskInfo(
        name=name,
        metric=headline_metric(name, scores),
        num_items=counts["effective"],
        num_available=counts["original"],
        chance=_chance(tasks.tasks[name], limit) if name in tasks.tasks else None,
        offline=tasks.offline,
        version=None if version is None else str(version),
    )


def _chance(task: Task, limit: int | None) -> float | None:
    """Return the accuracy of guessing: the mean of `1 / choices` over items, 0 where the answer is written freely."""
    if task.OUTPUT_TYPE == "generate_until":
        return 0.0
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "doc_to_choice"):
        return None
    guesses = [1 / len(task.doc_to_choice(item)) for _, item in task.doc_iterator(limit=limit)]
    return sum(guesses) / len(guesses)
