"""Lines on stderr, which begin with the name of the script that runs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ..common.progress import Progress


_script = ContextVar("script", default="train.py")


@contextmanager
def running(script: str) -> Iterator[None]:
    """Have the lines in this context begin with `script`."""
    token = _script.set(script)
    try:
        yield
    finally:
        _script.reset(token)


def tell(message: str) -> None:
    """Print `message`."""
    print(f"{_script.get()}: {message}", file=sys.stderr)


def warn(message: str) -> None:
    """Print the warning `message`."""
    tell(f"warning: {message}")


class Stderr(Progress):
    """Progress of a script."""

    def tell(self, message: str) -> None:
        """Print `message`."""
        tell(message)

    def warn(self, message: str) -> None:
        """Print the warning `message`."""
        warn(message)
