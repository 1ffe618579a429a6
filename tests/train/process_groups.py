"""Training runs in several processes at once, as `torchrun` starts them, forked from a server that did the imports."""

import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch
from fork_server import SERVER
from training_processes import DEADLINE_SECONDS, begin_child
from training_runs import command_line


def _run(argv: list[str], log: str, environment: dict[str, str], with_engines: bool) -> None:
    begin_child(log, environment)
    torch.set_num_threads(1)
    from engines_on_cpu import offer_engines_on_cpu

    from upcycled_moe.train.train import main

    if with_engines:
        offer_engines_on_cpu()
    status = main(argv)
    sys.stdout.flush()
    os._exit(status)


def run_group(
    settings: dict, log: Path, *, num_processes: int, with_engines: bool = True, **environment: str
) -> list[int]:
    """Run the script in a group of processes, and return their exit statuses; what they print goes to the file `log`.

    Once one has failed the others are ended: they would wait for it.

    Args:
        with_engines: offer the engines that are for accelerators only; without, whole copies as on any CPU.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes), "MASTER_PORT": port}
    common |= {"MASTER_ADDR": "127.0.0.1", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", **environment}
    argv = command_line(settings)
    environments = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    processes = [SERVER.Process(target=_run, args=(argv, str(log), each, with_engines)) for each in environments]
    for process in processes:
        process.start()
    try:
        waiting = {process.sentinel: process for process in processes}
        while waiting:
            ended = multiprocessing.connection.wait(waiting, DEADLINE_SECONDS)
            assert ended, f"it does not end; output so far:\n{log.read_text()}"
            statuses = [waiting.pop(sentinel).exitcode for sentinel in ended]
            if any(statuses):
                break
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
