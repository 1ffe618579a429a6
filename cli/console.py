"""What a person sees: progress bars and warnings on stderr, tables on stdout."""

import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table


class ConsoleProgress:
    """Progress on stderr; bars only on a terminal."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr, highlight=False)

    @contextmanager
    def task(self, description: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Show a bar; see `upcycled_moe.common.progress.Progress`."""
        columns = [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
        with Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            *columns,
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        ) as progress:
            bar = progress.add_task(description, total=total)
            yield lambda advance: progress.advance(bar, advance)

    def tell(self, message: str) -> None:
        """Print how far the work is."""
        self.console.print(message, soft_wrap=True, markup=False)

    def warn(self, message: str) -> None:
        """Print a warning."""
        self.console.print(f"warning: {message}", style="yellow", soft_wrap=True, markup=False)


def quiet_libraries() -> None:
    """Keep the progress bars and notices of the libraries underneath off stderr; ours say what they say.

    But the Hub's downloads may take long, and nothing else tells of them: their bars stay, on a terminal.
    """
    # By its variable: importing datasets takes half a second, and a conversion without text needs none of it.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

    import huggingface_hub
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    are_downloads_quiet = are_progress_bars_disabled()
    with warnings.catch_warnings():
        # The Hub's own switch in the environment wins, and it says so.
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()  # the Hub's too
    if not are_downloads_quiet:
        enable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()  # it tells of every retry


def stdout_console(*tables: Table) -> Console:
    """Return the console for results; wide enough for `tables`, and 120 columns, when it is not a terminal."""
    console = Console(highlight=False)
    if console.is_terminal:
        return console
    unbounded = console.options.update_width(10**6)
    widths = [Measurement.get(console, unbounded, table).maximum for table in tables]
    return Console(highlight=False, width=max([120, *widths]))


def results_table(title: str, *columns: str, numbers: Collection[str] = ()) -> Table:
    """Return an empty table, narrow enough that tensor names fit into 80 columns; `numbers` are set to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table
