"""Models from the Hub, by its real client and a local server that speaks just enough of the Hub's language."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from dense_checkpoints import write_dense
from safetensors.torch import load_file
from warm_python import RUN_THE_COMMAND_LINE, WarmPython

from upcycled_moe.conversion.plan import build_plan
from upcycled_moe.conversion.recipe import ConversionRecipe
from upcycled_moe.conversion.source import open_source


COMMIT = "0123456789abcdef0123456789abcdef01234567"
RECIPE = ["--router", "linear", "--num-experts", "4"]
# As with HF_HUB_OFFLINE=1, which is read at the import.
GO_OFFLINE = "import huggingface_hub; huggingface_hub.constants.HF_HUB_OFFLINE = True; "


class Hub(ThreadingHTTPServer):
    """Serves the files of `folder` as the model `org/model`, whose branch `main` is at COMMIT; keeps a log."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.folder, self.log = None, []

    def weight_requests(self):
        """Return (method, file, range, bytes sent) of the requests for weights."""
        return [request for request in self.log if request[1].endswith(".safetensors")]


class HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = self.path.partition("?")[0]
        files = sorted(path for path in self.server.folder.iterdir() if path.is_file())
        if re.fullmatch("/api/models/org/model(/revision/main)?", path):
            siblings = [{"rfilename": file.name} for file in files]
            self.answer_json({"id": "org/model", "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/org/model/tree/{COMMIT}":
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": git_id(f)} for f in files]
            self.answer_json(entries)
        elif (
            path.startswith(f"/org/model/resolve/{COMMIT}/")
            and (file := self.server.folder / path.split("/")[-1]) in files
        ):
            self.answer_file(file)
        else:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET  # noqa: N815 - called so by http.server

    def answer_json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer_file(self, file):
        content, asked = file.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": f'"{git_id(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked:
            begin, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
            content = content[begin : end + 1]
        self.server.log.append((self.command, file.name, self.headers.get("Range"), len(content)))
        self.answer(206 if asked else 200, content, headers)

    def answer(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def git_id(file):
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """A dense checkpoint, in one file unless asked otherwise; larger than what the Hub's client reads for a header."""
    max_shard_size = getattr(request, "param", "5GB")
    return write_dense(tmp_path_factory.mktemp("hub") / "model", max_shard_size=max_shard_size, intermediate_size=256)


@pytest.fixture(scope="module")
def server():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def hub(server, folder):
    server.folder, server.log = folder, []
    return server


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("hub") / "cache"


@pytest.fixture(scope="module")
def python(server, cache):
    """Processes for which `server` is the Hub."""
    proxies = {"http_proxy", "https_proxy", "all_proxy"}
    environment = {name: value for name, value in os.environ.items() if name.lower() not in proxies}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    environment |= {"HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with WarmPython(environment) as python:
        yield python


@pytest.fixture
def run(hub, cache, python, tmp_path):
    """`run("plan", …)`: run the command line with `hub` as the Hub and a cache that was empty before the test."""
    shutil.rmtree(cache, ignore_errors=True)

    def run(*arguments, is_offline=False):
        return python.run(GO_OFFLINE * is_offline + RUN_THE_COMMAND_LINE, *arguments, cwd=tmp_path)

    return run


@pytest.mark.parametrize(
    ("command", "folder"), [("plan", "5GB"), ("convert", "300KB")], ids=["one file", "shards"], indirect=["folder"]
)
def test_a_plan_reads_only_the_headers_of_the_weights(run, hub, folder, cache, tmp_path, command):
    arguments = [command, "org/model", "out", *RECIPE, "--json", *(["--dry-run"] * (command == "convert"))]
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    assert all(method == "HEAD" or asked for method, _, asked, _ in hub.weight_requests()), hub.log
    files = sorted(folder.glob("*.safetensors"))
    fetched = sum(num_bytes for method, *_, num_bytes in hub.weight_requests() if method == "GET")
    assert 0 < fetched <= 100_001 * len(files) < sum(file.stat().st_size for file in files)
    assert not list(cache.rglob("*.safetensors"))
    assert not (tmp_path / "out").exists()
    plan = json.loads(result.stdout)
    assert plan["source"] == {"name": "org/model", "revision": COMMIT}
    recipe = ConversionRecipe(router="linear", num_experts=4)
    expected = build_plan(open_source(str(folder)), recipe).to_dict()
    same = ("tensors", "shards", "num_bytes", "total_parameters", "active_parameters", "peak_memory_bytes")
    assert {name: plan[name] for name in same} == {name: expected[name] for name in same}


@pytest.mark.parametrize("folder", ["300KB"], ids=["shards"], indirect=True)
def test_a_conversion_downloads_and_records_the_commit(run, hub, folder, tmp_path):
    result = run("convert", "org/model", "out", *RECIPE, "--verify")
    assert result.returncode == 0, result.stderr
    assert all((("GET", file.name) in {request[:2] for request in hub.log}) for file in folder.glob("*.safetensors"))
    provenance = json.loads((tmp_path / "out" / "upcycling.json").read_text(encoding="utf-8"))
    assert (provenance["source"]["name"], provenance["source"]["revision"]) == ("org/model", COMMIT)
    # The recorded recipe alone does it again, also when the branch has moved.
    assert (provenance["recipe"]["model"], provenance["recipe"]["revision"]) == ("org/model", COMMIT)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    # What is in the cache is enough for a plan, also where there is no network.
    result = run("plan", "org/model", *RECIPE, "--json", is_offline=True)
    assert result.returncode == 0, result.stderr
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor["name"] for tensor in json.loads(result.stdout)["tensors"]} == set(weights)


def test_a_plan_without_cache_and_network_is_one_line(run):
    result = run("plan", "org/model", *RECIPE, is_offline=True)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "org/model: neither a local folder nor a Hub model that can be fetched" in result.stderr


def test_a_header_that_cannot_be_read_is_one_line(run, hub, tmp_path):
    hub.folder = shutil.copytree(hub.folder, tmp_path / "spoiled")
    file = sorted(hub.folder.glob("*.safetensors"))[-1]
    file.write_bytes(b"\xff" * 200)
    result = run("plan", "org/model", *RECIPE)
    assert (result.returncode, result.stdout) == (2, "")
    # Above it are the bars of the download.
    *bars, message = result.stderr.splitlines()
    assert all(bar.startswith("Fetching ") for bar in bars if bar), bars
    assert message.startswith(f"upcycled-moe: error: org/model: {file.name} cannot be read from the Hub (")


@pytest.mark.parametrize("are_disabled", [False, True])
def test_bars_of_downloads_stay_as_they_are(are_disabled):
    code = (
        "from huggingface_hub.utils import are_progress_bars_disabled\n"
        "from upcycled_moe.cli.console import quiet_libraries\n"
        "quiet_libraries()\n"
        f"assert are_progress_bars_disabled() is {are_disabled}\n"
    )
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": str(int(are_disabled))}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
