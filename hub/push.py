"""Uploading a checkpoint to the Hub: checked before, private unless asked otherwise, and in one commit.

Large files go up first, one after the other; a commit then makes all files appear at once, so that nobody ever loads
half a checkpoint. The same call goes on with an upload that was cut short: the Hub has what arrived, and the client
asks before it sends a file.
"""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from ..common.progress import Progress
from ..common.settings import SettingsError
from ..model_cards.card import CARD_FILE
from ..model_cards.names import is_hub_id
from .files import Upload, is_weights, plan_upload


DEFAULT_BRANCH = "main"
WAY_TO_TOKEN = (
    "log in with `hf auth login`, or set HF_TOKEN, to a token that may write (https://hf.co/settings/tokens)"
)


class PushError(OSError):
    """The Hub or the way to it failed; the same call can succeed later, and sends only what has not arrived."""


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint goes.

    Args:
        repo_id: `org/name`.
        revision: branch; made if there is none.
        private: whether the repository is to be seen by its owners only.
        token: the one that is logged in, or of the environment, unless given.
    """

    repo_id: str
    revision: str = DEFAULT_BRANCH
    private: bool = True
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not is_hub_id(self.repo_id):
            raise SettingsError(
                f"{self.repo_id!r} is no repository of the Hub; write org/name or user/name, of letters, digits and "
                "single -, _ or . between them."
            )

    @property
    def visibility(self) -> str:
        """What is asked for, in a word."""
        return "private" if self.private else "public"

    def command(self, folder: str | Path) -> str:
        """Return the command that pushes `folder` there; it takes the token that is logged in."""
        words = ["upcycled-moe", "push", str(folder), self.repo_id]
        words += [] if self.revision == DEFAULT_BRANCH else ["--revision", self.revision]
        return shlex.join(words if self.private else [*words, "--public"])

    def api(self) -> HfApi:
        """Return the client that reaches it."""
        return HfApi(token=self.token)


@dataclass(frozen=True)
class PushResult:
    """What is on the Hub now.

    Args:
        url: of the repository at that branch.
        commit: its newest; an older one than this push if nothing had changed.
        is_private: whether the repository is.
        removed: weight files of an earlier model, which would be loaded instead.
    """

    url: str
    commit: str
    is_private: bool
    removed: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        visibility = "private" if self.is_private else "public"
        return {"url": self.url, "commit": self.commit, "visibility": visibility, "removed": list(self.removed)}


def check_destination(destination: Destination) -> bool | None:
    """Check that `destination` can be pushed to, as far as can be told without writing.

    For before the work of hours whose result is to be pushed.

    Returns:
        Whether the repository is private; None if there is none yet.

    Raises:
        SettingsError: if the Hub is switched off, there is no valid token or it may not write, or the repository is
            public, and that was not asked for.
        PushError: if the Hub does not answer.
    """
    if constants.HF_HUB_OFFLINE:
        raise SettingsError(f"{destination.repo_id}: HF_HUB_OFFLINE=1 switches the Hub off; unset it to push.")
    if destination.token is None and get_token() is None:
        raise SettingsError(f"{destination.repo_id}: no token for the Hub; {WAY_TO_TOKEN}.")
    api = destination.api()
    with _talking(destination):
        user = api.whoami()
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise SettingsError(f"{destination.repo_id}: the token of {user['name']} may only read; {WAY_TO_TOKEN}.")
        try:
            is_private = api.model_info(destination.repo_id).private
        except RepositoryNotFoundError:
            return None
    if destination.private and not is_private:
        raise SettingsError(
            f"{destination.repo_id}: is public on the Hub; give --public (hub_private_repo=false in training) to "
            "publish there, or make it private first."
        )
    return bool(is_private)


def push(upload: Upload, destination: Destination, progress: Progress | None = None) -> PushResult:
    """Bring the files of `upload` to `destination`, in one commit.

    Weight files there of an earlier model are removed by the same commit; other files stay.

    Raises:
        SettingsError: as [`check_destination`], or if the Hub does not allow it or refuses the card.
        PushError: if the Hub does not answer, or fails.
    """
    progress = progress or Progress()
    is_private = check_destination(destination)
    if is_private and not destination.private:
        progress.warn(f"{destination.repo_id} is private on the Hub and stays so; its owner can publish it there.")
    api, target = destination.api(), {"repo_id": destination.repo_id, "revision": destination.revision}
    with _talking(destination), _bars_on_terminals_only():
        # Before anything else: of all that is sent only this can be wrong, and a repository would be left empty.
        _check_card(api, upload)
        if is_private is None:
            api.create_repo(destination.repo_id, private=destination.private, exist_ok=True)
            is_private = destination.private
        if destination.revision != DEFAULT_BRANCH:
            api.create_branch(destination.repo_id, branch=destination.revision, exist_ok=True)
        commit, removed = _upload(api, upload, target)
    branch = "" if destination.revision == DEFAULT_BRANCH else f"/tree/{destination.revision}"
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


def _check_card(api: HfApi, upload: Upload) -> None:
    """Let the Hub check the card; `ModelCard.validate` asks huggingface.co in older releases, whatever HF_ENDPOINT."""
    card = upload.folder / CARD_FILE
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"content": card.read_text(encoding="utf-8"), "repoType": "model"},
        headers=build_hf_headers(token=api.token),
    )
    if response.status_code == 400:
        problems = [str(problem.get("message")) for problem in response.json().get("errors", [])]
        raise SettingsError(f"{card}: refused by the Hub ({_line('; '.join(problems))}); correct it.")
    hf_raise_for_status(response)


def _upload(api: HfApi, upload: Upload, target: dict[str, str]) -> tuple[str, tuple[str, ...]]:
    """Return the commit with all files, and the files that it removed."""
    additions = [CommitOperationAdd(file.path, upload.folder / file.path) for file in upload.files]
    weights = [addition for addition in additions if addition.path_in_repo.endswith(".safetensors")]
    others = [addition for addition in additions if addition not in weights]
    # Weights one by one: what has arrived need not be sent again. No .gitignore there keeps any of them out.
    for batch in (others, *([addition] for addition in weights)):
        api.preupload_lfs_files(additions=batch, free_memory=False, gitignore_content="", **target)
    removed = tuple(sorted(_stale_weights(api, upload, target)))
    commit = api.create_commit(
        operations=[*additions, *map(CommitOperationDelete, removed)],
        commit_message="Upload checkpoint with upcycled-moe",
        **target,
    )
    return commit.oid, removed


def _stale_weights(api: HfApi, upload: Upload, target: dict[str, str]) -> set[str]:
    """Return the weight files of an earlier model that would stay: Transformers might load them instead."""
    return set(filter(is_weights, api.list_repo_files(**target))) - {file.path for file in upload.files}


@contextmanager
def _talking(destination: Destination) -> Iterator[None]:
    """Turn what the client raises into one line. Addresses stay out of it: those of uploads are signed."""
    try:
        yield
    except SettingsError:
        raise
    # The client wraps some errors of threads in RuntimeError; Xet raises it too.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if getattr(error, "filename", None) is not None:
            raise  # a file here, not the Hub
        causes = list(_causes(error))
        answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
        if answer is None:
            is_network = any(isinstance(cause, OSError | HTTPError) for cause in causes)
            problem = "the Hub cannot be reached" if is_network else "the upload failed"
            kind = type(causes[-1]).__name__
            raise PushError(f"{destination.repo_id}: {problem} ({kind}: {_line(causes[-1])}).") from error
        status, reason = answer.response.status_code, _reason(answer)
        if status == 401:
            raise SettingsError(
                f"{destination.repo_id}: the Hub does not know the token ({reason}); {WAY_TO_TOKEN}."
            ) from error
        if status in (402, 403):
            raise SettingsError(
                f"{destination.repo_id}: the Hub does not allow it ({reason}); give a repository that the token may "
                "write to, or another token."
            ) from error
        raise PushError(f"{destination.repo_id}: the Hub failed ({reason}).") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Give `error` and what it came from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__


def _reason(answer: HfHubHTTPError) -> str:
    status = f"{answer.response.status_code} {answer.response.reason_phrase}".strip()
    return f"{status}: {_line(answer.server_message)}" if answer.server_message else status


def _line(text: object) -> str:
    return " ".join(str(text).split()).rstrip(".") or "no reason given"


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
