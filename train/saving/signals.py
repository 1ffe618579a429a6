"""Signals that ask a run to stop, as schedulers send them."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


# Slurm's `--signal=USR1@120` warns with the second one.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A scheduler may signal every process of a job, and the launcher then passes the same signal on.
REPEAT_SECONDS = 3.0


class StopSignals:
    """The signals that came while [`listening`].

    The first one is remembered, for the run to stop where it can. The same signal again, later than what a launcher
    passes on, ends the process at once.

    Attributes:
        received: Number of the first signal, or 0.
    """

    def __init__(self):
        self.received = 0
        self._arrivals: dict[int, float] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while in this context; outside the main thread, where Python has none, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: object) -> None:
        self.received = self.received or number
        first = self._arrivals.setdefault(number, time.monotonic())
        if time.monotonic() - first > REPEAT_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
