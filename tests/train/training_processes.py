"""Training runs in processes of their own that can be signalled and killed, and that start at once."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
from fork_server import SERVER
from training_runs import command_line


DEADLINE_SECONDS = 120


def begin_child(log: str, environment: dict[str, str]) -> None:
    """Let what this process prints go to the file `log`, and set its environment."""
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    if folder := environment.get("HF_DATASETS_CACHE"):
        # It was read when the server imported the library.
        datasets.config.HF_DATASETS_CACHE = Path(folder)


def _run(argv: list[str], log: str, environment: dict[str, str]) -> None:
    begin_child(log, environment)
    from upcycled_moe.train.train import main

    status = main(argv)
    sys.stdout.flush()
    os._exit(status)


class TrainingProcess:
    """A run of the script with `settings`, whose output goes to the file `log`."""

    def __init__(self, settings: dict, log: Path, **environment: str):
        self.log = log
        log.touch()
        self._process = SERVER.Process(target=_run, args=(command_line(settings), str(log), environment))
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return as soon as `condition()` holds, or the process has ended."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self._process.is_alive() and not condition():
            assert time.monotonic() < deadline, f"nothing happened; output so far:\n{self.output()}"
            self._process.join(0.001)

    def send(self, number: signal.Signals) -> None:
        # It may just have ended by itself.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Return the exit status, negative for the signal that ended it."""
        self._process.join(DEADLINE_SECONDS)
        assert self._process.exitcode is not None, f"it does not end; output so far:\n{self.output()}"
        return self._process.exitcode

    def output(self) -> str:
        return self.log.read_text()


@contextlib.contextmanager
def started(*args, **kwargs) -> Iterator[TrainingProcess]:
    """Yield a [`TrainingProcess`], which does not outlive the test."""
    process = TrainingProcess(*args, **kwargs)
    try:
        yield process
    finally:
        process.send(signal.SIGKILL)
