"""What goes wrong between here and the Hub, in one line without addresses: those of uploads are signed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, HTTPError

from ..common.settings import SettingsError


WAY_TO_TOKEN = (
    "log in with `hf auth login`, or set HF_TOKEN, to a token that may write (https://hf.co/settings/tokens)"
)
# With the word before it that announces it.
_ADDRESS = re.compile(r"(?:[,;]?\s*(?:for\s+)?\(?(?:url|domain)\W*)?\bhttps?://[^\s'\"<>)]*\)?", re.IGNORECASE)
# What hf_xet makes of an answer.
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})([^)]*)\)")


class PushError(OSError):
    """The Hub or the way to it failed; the same call can succeed later, and sends only what has not arrived."""


@contextmanager
def talking(repo_id: str) -> Iterator[None]:
    """Turn what the client raises into one line on `repo_id`.

    Raises:
        SettingsError: if the Hub does not know the token, or does not allow what was asked.
        PushError: if it fails, or cannot be reached.
    """
    try:
        yield
    except (SettingsError, PushError):
        raise
    # The client wraps some errors of threads in RuntimeError; Xet raises it too.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if getattr(error, "filename", None) is not None:
            raise  # a file here, not the Hub
        causes = list(_causes(error))
        if (answer := next(filter(None, map(_answer, causes)), None)) is not None:
            raise _refusal(repo_id, *answer) from error
        is_network = any(isinstance(cause, OSError | HTTPError) for cause in causes)
        problem = "the Hub cannot be reached" if is_network else "the upload failed"
        raise PushError(f"{repo_id}: {problem} ({type(causes[-1]).__name__}: {line(causes[-1])}).") from error


def line(text: object) -> str:
    """Return `text` in one line, without addresses."""
    return " ".join(_ADDRESS.sub("", str(text)).split()).rstrip(".,: ") or "no reason given"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Give `error` and what it came from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: BaseException) -> tuple[int, str] | None:
    """Return the status and the reason that the Hub answered, None if `error` is not its answer."""
    if isinstance(error, HfHubHTTPError):
        status = f"{error.response.status_code} {error.response.reason_phrase}".strip()
        message = f": {line(error.server_message)}" if error.server_message else ""
        return error.response.status_code, status + message
    if match := _XET_STATUS.search(str(error)):
        return int(match[1]), (match[1] + match[2]).strip()
    return None


def _refusal(repo_id: str, status: int, reason: str) -> SettingsError | PushError:
    if status == 401:
        return SettingsError(f"{repo_id}: the Hub does not know the token ({reason}); {WAY_TO_TOKEN}.")
    # A repository that the token may not see is not found.
    if status in (402, 403, 404):
        return SettingsError(
            f"{repo_id}: the Hub does not allow it ({reason}); give a repository that the token may write to, or "
            "another token."
        )
    return PushError(f"{repo_id}: the Hub failed ({reason}).")
