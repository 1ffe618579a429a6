"""The project's own commands, run in this process, which has imported torch; each is logged as one types it."""

import shlex
from collections.abc import Mapping
from typing import Any


class CommandError(RuntimeError):
    """A command ended with another status than 0."""


def upcycled_moe(*arguments: object) -> None:
    """Run a command of `upcycled-moe`.

    Raises:
        CommandError: if it fails; the reason is in the log.
    """
    from upcycled_moe.cli.main import main

    _run("upcycled-moe", main, [str(argument) for argument in arguments])


def train_policy(settings: Mapping[str, Any]) -> None:
    """Run `train/train.py`; raises as `upcycled_moe` does."""
    from upcycled_moe.train.train import main

    _run("python train/train.py", main, _key_values(settings))


def train_reward(settings: Mapping[str, Any]) -> None:
    """Run `train/reward.py`; raises as `upcycled_moe` does."""
    from upcycled_moe.train.reward import main

    _run("python train/reward.py", main, _key_values(settings))


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as flags; true is a switch."""
    return [
        argument
        for name, value in settings.items()
        for argument in ([f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)]))
    ]


def _key_values(settings: Mapping[str, Any]) -> list[str]:
    return [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()]


def _run(program: str, main: Any, arguments: list[str]) -> None:
    print(f"\n$ {program} {shlex.join(arguments)}", flush=True)
    if status := main(arguments):
        raise CommandError(f"{program} {arguments[0]} failed with status {status}.")
