"""`upcycled-moe push`: a checkpoint goes to the Hugging Face Hub."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .push_options import PUBLIC_HELP, print_push, pushing


if TYPE_CHECKING:
    from ..hub.destination import Destination
    from ..hub.files import Upload

MEMORY_ADVICE = "close what else runs"


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command to `commands`."""
    parser = commands.add_parser(
        "push",
        usage="%(prog)s FOLDER REPO_ID [options]",
        help="upload a checkpoint to the Hub",
        description="Upload the checkpoint in FOLDER to the Hugging Face Hub, in one commit: weights, configuration, "
        "code, tokenizer, card and provenance. Nothing else of the folder goes there: no optimizer, no checkpoint of "
        "a run, no log, no hidden file, no link. The repository is private unless --public is given.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of a checkpoint")
    parser.add_argument("repo_id", metavar="REPO_ID", help="org/name or user/name; made if there is none")
    parser.add_argument("--revision", metavar="BRANCH", help="branch (default: main); made if there is none")
    parser.add_argument("--public", action="store_true", help=PUBLIC_HELP)
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would go there and what not; asks and tells the Hub nothing"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from ..hub.destination import DEFAULT_BRANCH, Destination
    from ..hub.files import plan_upload
    from ..hub.push import push, warn_of_local_paths
    from .console import ConsoleProgress, quiet_libraries

    quiet_libraries()
    folder = Path(options.folder)
    revision = DEFAULT_BRANCH if options.revision is None else options.revision
    destination, progress = Destination(options.repo_id, revision, private=not options.public), ConsoleProgress()
    upload = plan_upload(folder)
    result = None
    if not options.dry_run:
        result = pushing(folder, destination, lambda: push(upload, destination, progress))
    elif options.public:
        warn_of_local_paths(upload, progress)
    if options.json:
        where = {"repo_id": destination.repo_id, "revision": destination.revision}
        asked = {"visibility": destination.visibility} if result is None else result.to_dict()
        print(json.dumps({**where, **asked, **upload.to_dict()}, indent=2))
        return 0
    print_upload(upload, destination, options.dry_run)
    if result is not None:
        print_push(result)
    return 0


def print_upload(upload: "Upload", destination: "Destination", dry_run: bool) -> None:
    """Print what goes to the Hub, or would, and what stays behind."""
    from rich.markup import escape

    from ..common.numbers import format_bytes
    from .console import results_table, stdout_console

    verb = "Would push" if dry_run else "Pushed"
    files = results_table(escape(f"{verb} from {upload.folder}"), "File", "Size", numbers=("Size",))
    for file in upload.files:
        files.add_row(escape(file.path), format_bytes(file.num_bytes))
    tables = [files]
    if upload.left_out:
        stayed = results_table("Left out", "Path", "Reason")
        for entry in upload.left_out:
            stayed.add_row(escape(entry.path), entry.reason)
        tables.append(stayed)
    console = stdout_console(*tables)
    for table in tables:
        console.print(table)
    if dry_run:
        branch = f"branch {destination.revision}, {destination.visibility} if new"
        total = f"{len(upload.files)} files, {format_bytes(upload.num_bytes)}"
        console.print(
            f"Would push {total} to {destination.repo_id} ({branch}). Nothing was sent.", soft_wrap=True, markup=False
        )
