"""What ends a run that was started rightly."""


class RunError(RuntimeError):
    """A run cannot go on, for a reason that its user can act on: one line, and exit status 1."""
