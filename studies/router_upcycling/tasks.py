"""Tasks that write a folder each, once: run in parallel, in the order that they need each other."""

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upcycled_moe.common.files import replacing
from upcycled_moe.common.output_folder import FolderKind, staged
from upcycled_moe.common.settings import SettingsError


TASK_FILE = "task.json"
LOG_FOLDER = "logs"
LOCK_FILE = "study.lock"
TASK_FOLDER = FolderKind("result of a task", (TASK_FILE,))

# Settings of the task, its input folders and files by name, and the folder to write.
TaskFunction = Callable[[Mapping[str, Any], Mapping[str, Path], Path], None]


class TaskError(RuntimeError):
    """A task failed."""


@dataclass(frozen=True)
class Task:
    """A function that writes a folder, from settings and from the folders of other tasks.

    Args:
        name: its folder, below that of the study.
        function: importable by its name, since another process calls it; the same arguments give the same result.
        settings: all that the result depends on besides the inputs; they fit in JSON.
        inputs: names of other tasks.
        files: by name, files that it reads; their content counts, not where they lie.
        bulky: names of files and folders that only other tasks read; they are deleted once those are done, unless
            asked to stay.
    """

    name: str
    function: TaskFunction
    settings: Mapping[str, Any]
    inputs: tuple[str, ...] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    bulky: tuple[str, ...] = ()


def fingerprints(tasks: Sequence[Task]) -> dict[str, str]:
    """Return by name what the result of each task depends on, as a digest; tasks come after their inputs."""
    found: dict[str, str] = {}
    for task in tasks:
        content = {
            "function": task.function.__name__,
            "settings": task.settings,
            "inputs": {name: found[name] for name in task.inputs},
            "files": {name: _digest(path) for name, path in task.files.items()},
        }
        found[task.name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return found


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tasks_to_do(tasks: Sequence[Task], output: Path) -> list[Task]:
    """Return the tasks whose folder is not there whole, made with these settings and inputs.

    One whose bulky files are gone is done, unless another one that is to do reads them.
    """
    wanted = fingerprints(tasks)
    to_do: set[str] = set()
    for task in reversed(tasks):
        folder = output / task.name
        is_read = any(task.name in other.inputs and other.name in to_do for other in tasks)
        is_complete = all((folder / name).exists() for name in task.bulky)
        if made_with(folder) != wanted[task.name] or (is_read and not is_complete):
            to_do.add(task.name)
    return [task for task in tasks if task.name in to_do]


def made_with(folder: Path) -> str | None:
    """Return the fingerprint of the task that wrote `folder`, None if none did."""
    try:
        return json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError):
        return None


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold `output` for this command alone; the kernel gives it back when the command ends, however it ends.

    Raises:
        TaskError: if another one holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TaskError(
                f"{output}: another study is written there; wait for it, or give another --output."
            ) from None
        yield


def run_tasks(
    tasks: Sequence[Task],
    output: Path,
    num_workers: int,
    *,
    keep_bulky: bool = False,
    announce: Callable[[str], None] = print,
) -> None:
    """Run those of `tasks` that are to do, `num_workers` at a time; one that fails stops only those that need it.

    Raises:
        SettingsError: if all that failed say that their settings do not work.
        TaskError: if tasks failed otherwise; the message names the log.
    """
    to_do, wanted = tasks_to_do(tasks, output), fingerprints(tasks)
    if done := len(tasks) - len(to_do):
        announce(f"{done} of {len(tasks)} results are there already.")
    waiting, running, finished = list(to_do), {}, done
    open_names, failures = {task.name for task in to_do}, []
    # Workers import torch once, and serve many tasks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context, initializer=_start_worker) as pool:
        try:
            while True:
                for task in [task for task in waiting if not open_names & set(task.inputs)]:
                    if len(running) < num_workers:
                        waiting.remove(task)
                        running[pool.submit(_execute, task, output, wanted[task.name])] = task
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    try:
                        seconds = _result(future, task, output)
                    except (SettingsError, TaskError) as error:
                        failures.append(error)
                        # Its name stays open, so that nothing that needs it begins.
                        announce(f"Failed: {error}")
                        continue
                    open_names.remove(task.name)
                    finished += 1
                    announce(f"[{finished}/{len(tasks)}] {task.name}, {seconds:.0f} s")
                    if not keep_bulky:
                        _delete_bulky(tasks, open_names, output)
        except BaseException:
            # What runs would otherwise be waited for; nothing half-written counts.
            workers = list(pool._processes.values())
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.join()
            raise
    if failures:
        raise _summary(failures, len(waiting))
    if not keep_bulky:
        _delete_bulky(tasks, set(), output)


def _summary(failures: Sequence[Exception], num_left_out: int) -> Exception:
    """Return the one failure, or one that counts them."""
    if len(failures) == 1 and not num_left_out:
        return failures[0]
    kind = SettingsError if all(isinstance(failure, SettingsError) for failure in failures) else TaskError
    return kind(f"{len(failures)} failed, {num_left_out} that need them did not run; the first: {failures[0]}")


def _result(future: Future, task: Task, output: Path) -> float:
    try:
        return future.result()
    except SettingsError as error:
        raise SettingsError(f"{task.name}: {error}") from error
    except BrokenProcessPool:
        # Nothing can run any more, so that this is not one task's failure.
        raise
    except Exception as error:
        log = output / LOG_FOLDER / f"{task.name}.log"
        raise TaskError(f"{task.name}: {type(error).__name__}: {error}; see {log}.") from error


def _delete_bulky(tasks: Sequence[Task], open_names: set[str], output: Path) -> None:
    """Delete bulky files that no task reads any more."""
    for task in tasks:
        readers = {other.name for other in tasks if task.name in other.inputs}
        if task.name not in open_names and not readers & open_names:
            for path in (output / task.name / name for name in task.bulky):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)


def _start_worker() -> None:
    from tqdm import tqdm

    # Ctrl-C reaches all processes of a terminal; the parent ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The lock that tqdm would make is shared between processes, and a worker that is ended would leave it behind.
    tqdm.set_lock(threading.RLock())
    # Without it a worker would outlive a parent that was killed, and wait for work for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _execute(task: Task, output: Path, fingerprint: str) -> float:
    """Write the folder of `task`, all or nothing, and return the seconds that it took."""
    folder = output / task.name
    log = output / LOG_FOLDER / f"{task.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    inputs = {**{name: output / name for name in task.inputs}, **task.files}
    began, cpu_began = time.time(), time.process_time()
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            with staged(folder, kind=TASK_FOLDER) as partial:
                task.function(task.settings, inputs, partial)
                ended = time.time()
                content = {
                    "fingerprint": fingerprint,
                    "settings": task.settings,
                    "began": began,
                    "ended": ended,
                    "cpu_seconds": time.process_time() - cpu_began,
                }
                with replacing(partial / TASK_FILE) as path:
                    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except Exception:
            traceback.print_exc()
            raise
    return ended - began


def busy_seconds(tasks: Sequence[Task], output: Path) -> float:
    """Return how long at least one task was running: the wall time of the study, without pauses between its starts."""
    spans = []
    for task in tasks:
        content = json.loads((output / task.name / TASK_FILE).read_text(encoding="utf-8"))
        spans.append((content["began"], content["ended"]))
    total, until = 0.0, 0.0
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total
