"""Where a checkpoint goes on the Hub, and whether it may."""

import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..common.hub_names import is_hub_id
from ..common.settings import SettingsError
from .errors import WAY_TO_TOKEN, PushError, talking


DEFAULT_BRANCH = "main"
# What git allows in no name of a branch (git-check-ref-format), and a part of it that begins with a dot.
_NO_BRANCH = re.compile(r"""[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-/]|[/.]$|(?:^|/)\.|\.lock(?:/|$)|^@$|^refs/|^$""")


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
        if _NO_BRANCH.search(self.revision):
            raise SettingsError(
                f"{self.revision!r} is no name of a branch; write words of letters, digits, -, _ or ., with / between "
                "them, and without refs/."
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
        """Return the client that reaches it.

        Raises:
            SettingsError: if the Hub is switched off, its address is none, or there is no token that can be sent.
        """
        if constants.HF_HUB_OFFLINE:
            raise SettingsError(f"{self.repo_id}: HF_HUB_OFFLINE=1 switches the Hub off; unset it to push.")
        if not re.match(r"https?://.", constants.ENDPOINT):
            raise SettingsError(
                f"{self.repo_id}: HF_ENDPOINT={constants.ENDPOINT} is no address; begin it with https://, or unset it."
            )
        # Given, as the client sends none by itself under HF_HUB_DISABLE_IMPLICIT_TOKEN.
        token = self.token or get_token()
        if token is None:
            raise SettingsError(f"{self.repo_id}: no token for the Hub; {WAY_TO_TOKEN}.")
        if not (token.isascii() and token.isprintable()):
            origin = "HF_TOKEN" if os.environ.get("HF_TOKEN") and not self.token else "the token"
            raise SettingsError(f"{self.repo_id}: {origin} has characters that no token has; {WAY_TO_TOKEN}.")
        return HfApi(token=token)


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
    api = destination.api()
    with talking(destination.repo_id):
        user = _user(api)
        if user is None:
            raise PushError(f"{destination.repo_id}: no Hub answers at {api.endpoint}.")
        if _role(user) == "read":
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


def _user(api: HfApi) -> dict[str, Any] | None:
    """Return whose token it is, None if what answers is no Hub."""
    try:
        user = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code == 404:
            return None
        raise
    except ValueError:
        return None  # not JSON
    return user if isinstance(user, dict) and "name" in user else None


def _role(user: dict[str, Any]) -> str | None:
    for key in ("auth", "accessToken"):
        user = user.get(key)
        if not isinstance(user, dict):
            return None
    return user.get("role")
