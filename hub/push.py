"""Uploading a checkpoint to the Hub: checked before, private unless asked otherwise, and in one commit.

Large files go up first, one after the other; a commit then makes all files appear at once, so that nobody ever loads
half a checkpoint. The same call goes on with an upload that was cut short: the Hub has what arrived, and the client
asks before it sends a file.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from ..common.numbers import format_bytes
from ..common.progress import Progress
from ..common.settings import SettingsError
from ..model_cards.card import CARD_FILE
from .destination import DEFAULT_BRANCH, Destination, check_destination
from .errors import PushError, line, talking
from .files import Upload, plan_upload
from .parts import is_loaded


@dataclass(frozen=True)
class PushResult:
    """What is on the Hub now.

    Args:
        url: of the repository at that branch.
        commit: its newest; an older one than this push if nothing had changed.
        is_private: whether the repository is.
        removed: files of an earlier model, which would be loaded with this one, or in its place.
    """

    url: str
    commit: str
    is_private: bool
    removed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        visibility = "private" if self.is_private else "public"
        return {"url": self.url, "commit": self.commit, "visibility": visibility, "removed": list(self.removed)}


def push(upload: Upload, destination: Destination, progress: Progress | None = None) -> PushResult:
    """Bring the files of `upload` to `destination`, in one commit.

    Files there of an earlier model that loading this one would take are removed by the same commit; others stay.

    Raises:
        SettingsError: as [`check_destination`], or if the Hub does not allow it or refuses the card.
        PushError: if the Hub does not answer, or fails, or the folder changes meanwhile.
    """
    progress = progress or Progress()
    is_private = check_destination(destination)
    if is_private and not destination.private:
        progress.warn(f"{destination.repo_id} is private on the Hub and stays so; its owner can publish it there.")
    if not (destination.private or is_private):
        warn_of_local_paths(upload, progress)
    api, target = destination.api(), {"repo_id": destination.repo_id, "revision": destination.revision}
    with talking(destination.repo_id), _bars_on_terminals_only():
        # Before anything else: of all that is sent only this can be wrong, and a repository would be left empty.
        _check_card(api, upload)
        if is_private is None:
            api.create_repo(destination.repo_id, private=destination.private, exist_ok=True)
            is_private = destination.private
        if destination.revision != DEFAULT_BRANCH:
            api.create_branch(destination.repo_id, branch=destination.revision, exist_ok=True)
        commit, removed = _upload(api, upload, target, progress)
    branch = "" if destination.revision == DEFAULT_BRANCH else f"/tree/{quote(destination.revision, safe='')}"
    return PushResult(f"{api.endpoint}/{destination.repo_id}{branch}", commit, is_private, removed)


def push_written(folder: str | Path, destination: Destination, progress: Progress | None = None) -> PushResult:
    """Push the checkpoint in `folder`, which a command has just written and which stays whatever happens.

    Raises:
        PushError: if it cannot be pushed; the message has the command that does so later.
    """
    try:
        return push(plan_upload(folder), destination, progress)
    except (SettingsError, PushError) as error:
        raise PushError(
            f"{folder} is written, but not on the Hub: {error} Push it with `{destination.command(folder)}`."
        ) from error


def warn_of_local_paths(upload: Upload, progress: Progress) -> None:
    """Warn of what tells everyone how the folders of this machine are called."""
    if names := upload.with_local_paths:
        progress.warn(f"to be seen by everyone, with paths of this machine: {', '.join(names)}.")


def _check_card(api: HfApi, upload: Upload) -> None:
    """Let the Hub check the card; `ModelCard.validate` asks huggingface.co in older releases, whatever HF_ENDPOINT."""
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"content": upload.content(CARD_FILE).decode("utf-8"), "repoType": "model"},
        headers=build_hf_headers(token=api.token),
    )
    if response.status_code == 400:
        problems = [str(problem.get("message")) for problem in response.json().get("errors", [])]
        raise SettingsError(
            f"{upload.folder / CARD_FILE}: refused by the Hub ({line('; '.join(problems))}); correct it."
        )
    hf_raise_for_status(response)


def _upload(api: HfApi, upload: Upload, target: dict[str, str], progress: Progress) -> tuple[str, tuple[str, ...]]:
    """Return the commit with all files, and the files that it removed."""
    weights = [file for file in upload.files if file.content is None]
    operations = [CommitOperationAdd(file.path, file.content) for file in upload.files if file.content is not None]
    # No .gitignore there keeps any of them out.
    api.preupload_lfs_files(additions=operations, free_memory=False, gitignore_content="", **target)
    # Weights one by one: what has arrived need not be sent again.
    for number, file in enumerate(weights, start=1):
        progress.tell(f"{number} of {len(weights)}: {file.path}, {format_bytes(file.num_bytes)}")
        _check_unchanged(upload)
        addition = CommitOperationAdd(file.path, upload.folder / file.path)
        api.preupload_lfs_files(additions=[addition], free_memory=False, gitignore_content="", **target)
        operations.append(addition)
    removed = tuple(sorted(_stale_files(api, upload, target)))
    _check_unchanged(upload)
    commit = api.create_commit(
        operations=[*operations, *map(CommitOperationDelete, removed)],
        commit_message="Upload checkpoint with upcycled-moe",
        **target,
    )
    return commit.oid, removed


def _check_unchanged(upload: Upload) -> None:
    """Check that what goes up is of one model: the one that was checked."""
    if changed := upload.changed():
        raise PushError(f"{changed}: changed during the upload, so nothing of it is shown; push again.")


def _stale_files(api: HfApi, upload: Upload, target: dict[str, str]) -> set[str]:
    """Return the files of an earlier model that would stay, and that loading this one would take."""
    return set(filter(is_loaded, api.list_repo_files(**target))) - {file.path for file in upload.files}


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keep the Hub's bars of uploads, which nothing else tells of, but off files and pipes."""
    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
