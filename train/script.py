"""How a training script ends: an exit status, and one line on stderr that says why."""

from collections.abc import Callable

from ..common.settings import SettingsError
from .errors import RunEnded, RunError
from .messages import running, tell


def exit_status(script: str, run: Callable[[], None], way_on: Callable[[], str]) -> int:
    """Call `run` and return the exit status of `script`: 0 done, 1 failed, 2 wrong settings, 130 interrupted.

    A run that a signal stopped has a status of its own. Of several processes each one tells why it ends: the first to
    end has the launcher stop the others.

    Args:
        way_on: how to go on after an interruption.
    """
    with running(script):
        try:
            run()
        except SettingsError as error:
            status, reason = 2, str(error)
        # A full disk, a file that went away. Other exceptions are bugs, whose traceback is worth seeing.
        except (RunError, OSError) as error:
            status, reason = 1, str(error)
        except RunEnded as end:
            status, reason = end.status, str(end)
        except KeyboardInterrupt:
            status, reason = 130, f"interrupted; {way_on()}"
        else:
            return 0
        tell(reason)
        return status
