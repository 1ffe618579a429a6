"""What ends a run that was started rightly."""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that its user can act on: one line, and exit status 1."""


class RunEnded(Exception):  # noqa: N818 (nothing went wrong)
    """A run ends before its last step as it should: one line, and the exit status `status`."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status
