"""Processes of their own that need not wait for torch and Transformers: forked from one that has imported them.

It has imported no module of this project: what a program needs of those, it imports by itself.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path


PRELOADED = ("datasets", "transformers.modeling_utils", "transformers.models.qwen2.modeling_qwen2", "jinja2", "rich")
RUN_THE_COMMAND_LINE = "import sys; from upcycled_moe.cli.main import main; sys.exit(main(sys.argv[1:]))"


class WarmPython:
    """A server that forks a process for each program, with the `environment` that the imports shall see."""

    def __init__(self, environment: Mapping[str, str]):
        command = [sys.executable, "-I", __file__]
        self._server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def run(self, code: str, *arguments: object, cwd: Path | None = None, stdout: Path | None = None, **environment):
        """Run `code` as `python -c` does, wait for its end, and return what it printed, but what goes to `stdout`."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder, name) for name in ("out", "err"))
            request = {"code": code, "arguments": list(map(str, arguments)), "environment": environment}
            request |= {"cwd": str(cwd or Path.cwd()), "streams": [str(stdout or out), str(err)]}
            print(json.dumps(request), file=self._server.stdin)
            answer = self._server.stdout.readline()
            assert answer, "the server has ended"
            printed = out.read_text() if stdout is None else None
            return subprocess.CompletedProcess(arguments, int(answer), printed, err.read_text())

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        with self._server:
            self._server.stdin.close()


def serve() -> dict | None:
    """Answer each request with the exit status of its process; in that process, return the request."""
    for line in sys.stdin:
        process_id = os.fork()
        if process_id == 0:
            return json.loads(line)
        _, status = os.waitpid(process_id, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def become(request: dict) -> None:
    """Give this process the arguments, folder, environment and streams of the request."""
    sys.argv = ["-c", *request["arguments"]]
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    for number, path in enumerate([os.devnull, *request["streams"]]):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(descriptor, number)
        os.close(descriptor)


if __name__ == "__main__":
    for module in PRELOADED:
        __import__(module)
    # What is there now is never freed, or each process would copy it all while it ends.
    gc.freeze()
    if request := serve():
        become(request)
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
