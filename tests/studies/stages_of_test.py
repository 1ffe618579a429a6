"""Functions that tasks of the tests run, in processes of their own."""

import os
import time

from tqdm import tqdm

from upcycled_moe.common.settings import SettingsError


def append(settings, inputs, folder):
    """Write the text of all inputs, then that of the settings."""
    before = "".join((path / "text").read_text() for path in inputs.values())
    (folder / "text").write_text(before + settings["text"])


def fill_folder(settings, inputs, folder):
    """Write a folder with a file, and a file beside it."""
    (folder / "model").mkdir()
    (folder / "model" / "weights").write_text("large")
    (folder / "text").write_text("small")


def fail(settings, inputs, folder):
    """Fail half-way."""
    (folder / "text").write_text("half")
    raise ValueError("no luck")


def refuse(settings, inputs, folder):
    """Refuse the settings."""
    raise SettingsError("give another.")


def wait_for_ever(settings, inputs, folder):
    """Say who runs it, and never end; with a progress bar, as libraries show."""
    for _ in tqdm([0]):
        pass
    (folder / "pid.partial").write_text(str(os.getpid()))
    (folder / "pid.partial").rename(folder / "pid")
    time.sleep(3600)
