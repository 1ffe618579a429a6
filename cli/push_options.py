"""`--push-to-hub`: a command's result goes to the Hugging Face Hub too."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..common.progress import Progress
    from ..hub.destination import Destination
    from ..hub.push import PushResult

PUBLIC_HELP = "let everyone see a repository that is made; without it none is, and a public one is refused"


def add_push_options(parser: argparse.ArgumentParser) -> None:
    """Add `--push-to-hub` and what goes with it."""
    parser.add_argument(
        "--push-to-hub", metavar="REPO_ID", help="then upload OUT to the Hub, as `push` does: org/name"
    )
    parser.add_argument("--public", action="store_true", help=f"with --push-to-hub: {PUBLIC_HELP}")


def checked_destination(options: argparse.Namespace) -> "Destination | None":
    """Return where the result is to go, None if nowhere, having asked the Hub unless it is a dry run.

    Raises:
        SettingsError: if it cannot go there.
        PushError: if the Hub does not answer.
    """
    from ..common.settings import SettingsError

    if options.push_to_hub is None:
        if options.public:
            raise SettingsError("--public says who sees what --push-to-hub uploads; give both, or leave it out.")
        return None

    from ..hub.destination import Destination, check_destination

    destination = Destination(options.push_to_hub, private=not options.public)
    if not options.dry_run:
        check_destination(destination)
    return destination


def print_destination(destination: "Destination | None") -> None:
    """Print where the result of a dry run would go, if anywhere."""
    if destination is not None:
        print(f"Would push it to {destination.repo_id} ({destination.visibility}).")


def push_and_print(
    folder: Path,
    destination: "Destination | None",
    output: Mapping[str, Any] | None,
    progress: "Progress",
) -> None:
    """Push the result in `folder` to `destination`, if there is one, and tell of it.

    Args:
        output: the command's JSON, printed with what was pushed, or why it was not; None to print a line.

    Raises:
        PushError: if it cannot be pushed; it stays in `folder`.
    """
    if destination is None:
        if output is not None:
            print(json.dumps(output, indent=2))
        return

    from ..hub.errors import PushError
    from ..hub.push import push_written

    try:
        result = pushing(folder, destination, lambda: push_written(folder, destination, progress))
    except PushError as error:
        if output is not None:
            print(json.dumps({**output, "push": {"error": str(error)}}, indent=2))
        raise
    if output is None:
        print_push(result)
    else:
        print(json.dumps({**output, "push": result.to_dict()}, indent=2))


def pushing(folder: Path, destination: "Destination", push: Callable[[], "PushResult"]) -> "PushResult":
    """Return what `push` does; interrupted or terminated, it says how to go on."""
    try:
        return push()
    except (KeyboardInterrupt, SystemExit):
        command = destination.command(folder)
        print(f"upcycled-moe: what has arrived need not be sent again: `{command}` goes on.", file=sys.stderr)
        raise


def print_push(result: "PushResult") -> None:
    """Print what is on the Hub now."""
    for path in result.removed:
        print(f"Removed there: {path}, of an earlier model.")
    print(f"Pushed to {result.url} ({result.to_dict()['visibility']}), commit {result.commit[:8]}.")
