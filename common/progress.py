"""What long work tells while it runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Keeps silent; a subclass shows it to someone."""

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Give a function to call with each advance towards `total`; `unit` is what is counted, such as `bytes`."""
        yield lambda advance: None

    def tell(self, message: str) -> None:
        """Tell how far the work is, where a bar cannot."""

    def warn(self, message: str) -> None:
        """Tell of something that someone should act on."""
