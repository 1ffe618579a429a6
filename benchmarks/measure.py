"""Shared by the benchmarks: run a command as a whole process, describe the machine."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median


PAUSE_S = 8


@dataclass(frozen=True)
class Run:
    """Wall seconds, seconds of the processors and largest resident memory of one finished process."""

    wall_s: float
    cpu_s: float
    peak_memory_bytes: int


def run_process(command: Sequence[str], log: Path) -> Run:
    """Run `command` to its end, its output into `log`.

    Raises:
        RuntimeError: if it fails.
    """
    # What earlier runs left to be written would be written in this one's time, and memory that they freed just now is
    # cheaper to get than memory that a virtual machine has given back: all start after the same pause.
    os.sync()
    time.sleep(PAUSE_S)
    begin = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        # wait4 gives this child's own peak memory; RUSAGE_CHILDREN would give the largest of all so far.
        _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{command[0]} failed with status {process.returncode}:\n{log.read_text()[-2000:]}")
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def spread(values: Sequence[float]) -> str:
    """Return median, minimum and maximum as `5.1 (4.9-5.6)`."""
    return f"{median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def machine() -> str:
    """Return a line about machine and versions."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{_processor()}, {os.cpu_count()} CPUs, {memory_gb:.0f} GB, {sys.platform}, "
        f"Python {platform.python_version()}, {packages}, {time.strftime('%Y-%m-%d')}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
