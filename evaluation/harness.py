"""lm-evaluation-harness as a library: its tasks, with data of the Hub or of local files, and its scores of a model."""

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import Dataset
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..common.progress import Progress
from ..common.settings import SettingsError
from ..common.text import first_line
from .offline_data import read_offline_data
from .results import Score, TaskInfo
from .tasks import PAPER_GROUP, PAPER_TASKS, headline_metric


OWN_TASKS = Path(__file__).parent / "harness_tasks"
# Where the harness keeps the paper's tasks: an index of these takes no time, one of all its tasks ten seconds.
_PAPER_TASK_FOLDERS = (
    "openbookqa", "arc", "hellaswag", "winogrande", "super_glue/boolq", "super_glue/copa", "nq_open", "triviaqa"
)  # fmt: skip

# Answers to open questions are short, but a weak model never comes to a stop sign: what goes on for so long is wrong
# either way, and need not be generated to the harness's 256 tokens.
_SHORT_ANSWER_TASKS = ("nq_open", "triviaqa")
_SHORT_ANSWER_TOKENS = 64

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
    for name, task in loaded["tasks"].items():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(0)
        if name in _SHORT_ANSWER_TASKS:
            limit = {"max_gen_toks": _SHORT_ANSWER_TOKENS}
            task.set_config(key="generation_kwargs", value=limit, update=True)
    return HarnessTasks(loaded["tasks"], loaded["groups"], offline_data is not None, left_out)


def _load_from_hub(names: Sequence[str]) -> dict[str, Any]:
    manager = _task_manager()
    if not set(names) <= set(manager.all_tasks):
        manager = lm_eval.tasks.TaskManager(include_path=OWN_TASKS)
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
            raise SettingsError(
                f"{name}: the data of this task cannot be had ({type(error).__name__}: {first_line(error)}); without "
                "the Hub, give local files with --offline-data."
            ) from error
        for part in loaded:
            loaded[part] |= found[part]
    return loaded


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


class _Advance(CacheHook):
    """Counts answers: the harness hands each of them to a cache as soon as it has it."""

    def __init__(self, advance: Callable[[int], None]):
        super().__init__(None)
        self.advance = advance

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.advance(1)


class LanguageModel(HFLM):
    """A loaded model as the harness asks it; counts by task the items whose prompt does not fit in.

    Args:
        model: of any type; log-probabilities are taken in float32 whatever it computes in.
        batch_size: prompts in a forward pass, or `auto`.
        name: what progress calls it.

    Attributes:
        truncated: task and number of each item of which the beginning was cut off.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | str,
        name: str = "the model",
        progress: Progress | None = None,
    ):
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, softmax_dtype="float32"
        )
        self.name = name
        self.progress = progress or Progress()
        self.truncated: set[tuple[str, int]] = set()
        self._asked: Sequence[Instance] = ()

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where the task does not say; half the model's positions, if these are few."""
        return min(super().max_gen_toks, self.max_length // 2)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each continuation its log-probability, and whether it is the most probable one."""
        self._asked = requests
        try:
            with self._shown(f"Answers scored by {self.name}", requests):
                return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._asked = ()

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        # Rolling windows come here too, and are asked for by nobody.
        for instance, (_, context, continuation) in zip(self._asked, requests, strict=False):
            if len(continuation) > self.max_length:
                raise SettingsError(
                    f"{instance.task_name}: an answer of {len(continuation)} tokens is longer than the model's "
                    f"{self.max_length} positions; leave the task out (--tasks)."
                )
            # The last token is predicted, and not read.
            if len(context) + len(continuation) > self.max_length + 1:
                self.truncated.add((instance.task_name, instance.doc_id))
        return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text."""
        with self._shown(f"Texts scored by {self.name}", requests):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each prompt, up to a stop sign."""
        for instance in requests:
            prompt, settings = instance.args
            num_new = settings.get("max_gen_toks", self.max_gen_toks)
            if num_new >= self.max_length:
                raise SettingsError(
                    f"{instance.task_name}: generates up to {num_new} tokens, and the model has {self.max_length} "
                    "positions; leave the task out (--tasks)."
                )
            if len(self.tok_encode(prompt)) > self.max_length - num_new:
                self.truncated.add((instance.task_name, instance.doc_id))
        with self._shown(f"Answers written by {self.name}", requests):
            return super().generate_until(requests, disable_tqdm=True)

    @contextlib.contextmanager
    def _shown(self, description: str, requests: Sequence[Instance]) -> Iterator[None]:
        """Show progress in place of the harness's own bars."""
        with self.progress.task(description, len(requests), "requests") as advance:
            self.set_cache_hook(_Advance(advance))
            yield

    def num_truncated(self) -> dict[str, int]:
        """Return how many items were cut, by task."""
        return dict(Counter(task for task, _ in self.truncated))


def score_tasks(
    model: LanguageModel, tasks: HarnessTasks, limit: int | None = None
) -> tuple[dict[str, dict[str, Score]], dict[str, TaskInfo]]:
    """Return all figures of each task, and of each group that has any, and what is known of the task.

    Args:
        limit: items of each task, the first ones; by default all.
    """
    # The harness prints how it finds a batch size, where results go.
    with contextlib.redirect_stdout(sys.stderr):
        found = evaluate(model, {"tasks": tasks.tasks, "groups": tasks.groups}, limit=limit, log_samples=False)
    scores = {}
    for name, metrics in found["results"].items():
        if read := _read_scores(metrics):
            scores[name] = read
    infos = {name: _task_info(name, scores[name], tasks, found, limit) for name in scores}
    return scores, infos


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
        scores[name] = Score(float(value), None if isinstance(error, str) or error is None else float(error))
    return scores


def _task_info(
    name: str, scores: Mapping[str, Score], tasks: HarnessTasks, found: Mapping[str, Any], limit: int | None
) -> TaskInfo:
    counts = found["n-samples"].get(name, {"effective": 0, "original": 0})
    return TaskInfo(
        name=name,
        metric=headline_metric(name, scores),
        num_items=counts["effective"],
        num_available=counts["original"],
        chance=_chance(tasks.tasks[name], limit) if name in tasks.tasks else None,
        offline=tasks.offline,
        version=str(found["versions"].get(name)),
    )


def _chance(task: Task, limit: int | None) -> float | None:
    """Return the accuracy of guessing: the mean of `1 / choices` over items, 0 where the answer is written freely."""
    if task.OUTPUT_TYPE == "generate_until":
        return 0.0
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "doc_to_choice"):
        return None
    guesses = [1 / len(task.doc_to_choice(item)) for _, item in task.doc_iterator(limit=limit)]
    return sum(guesses) / len(guesses)
