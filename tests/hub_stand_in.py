"""A stand-in for the Hugging Face Hub, for its real client: repositories, large files, commits, and its refusals.

It speaks what `huggingface_hub` asks for when it uploads a model and takes it back, and keeps a log of all of it.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub.utils import _http, close_session


TOKEN = "hf_of_a_writer"
READ_TOKEN = "hf_of_a_reader"
# More than this goes in several parts.
PART_BYTES = 150_000


@dataclass
class Repository:
    """A repository: its branches, each a list of commits, each the files by path."""

    is_private: bool
    is_writable: bool = True
    gitignore: str = ""
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{}]})


@dataclass(frozen=True)
class Request:
    """A request, as it is answered: its body is what arrived."""

    method: str
    path: str
    body: bytes


class HubStandIn(ThreadingHTTPServer):
    """The server; `fail(request)` may give the status to answer instead, or "cut" to hang up halfway."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.log: list[Request] = []
        self.quota_bytes = 10**9
        self.fail: Callable[[Request], int | str | None] = lambda request: None

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """Return the files of a repository by their paths."""
        return self.repositories[repo_id].branches[branch][-1]

    def asked(self, pattern: str) -> list[Request]:
        """Return the requests whose method and path fit `pattern`."""
        return [request for request in self.log if re.search(pattern, f"{request.method} {request.path}")]

    def sent_objects(self) -> list[str]:
        """Return the digests of the large files that arrived, in their order, a part at a time."""
        return [request.path.split("/")[2] for request in self.asked("^PUT /objects/")]


@contextmanager
def running_hub(
    monkeypatch: pytest.MonkeyPatch, waits: Callable[[float], None] = lambda seconds: None
) -> Iterator[HubStandIn]:
    """Give a stand-in that this process takes for the Hub; `waits` is what the client does before it tries again."""
    settings = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
    for name, value in settings.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waits, time=_http.time.time))
    with HubStandIn() as hub:
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        close_session()  # it keeps the proxies of its beginning
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
            close_session()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # An answer is sent whole: in two pieces, the second would wait for the first to be acknowledged.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self):
        self.take(b"")

    def do_HEAD(self):
        self.take(b"")

    def do_POST(self):
        self.take(self.read_body())

    def do_PUT(self):
        # Asked before the body is read: a connection can break in the middle of it.
        self.take(None)

    def take(self, body):
        path, _, query = self.path.partition("?")
        request = Request(self.command, unquote(path), body or b"")
        failure = self.server.fail(request)
        if failure == "cut":
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            return
        if body is None:
            request = Request(self.command, unquote(path), self.read_body())
        self.server.log.append(request)
        if failure is not None:
            self.answer_error(failure, "no room")
            return
        for method, pattern, answer in ROUTES:
            if method == request.method and (match := re.fullmatch(pattern, request.path)):
                answer(self, request, *match.groups())
                return
        self.answer_error(404, f"no route {request.method} {request.path}?{query}")

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *arguments):
        pass

    # --- answers

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, value, status=200):
        self.answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def answer_error(self, status, message, **headers):
        content = json.dumps({"error": message}).encode()
        self.answer(status, content, Content_Type="application/json", X_Error_Message=message, **headers)

    # --- who asks, and for what

    def has_token(self):
        if self.headers.get("Authorization") in (f"Bearer {TOKEN}", f"Bearer {READ_TOKEN}"):
            return True
        self.answer_error(401, "Invalid credentials")
        return False

    def repository(self, repo_id, for_writing=False):
        """Return the repository, or None where an error was answered."""
        found = self.server.repositories.get(repo_id)
        if not self.has_token():
            return None
        if found is None:
            self.answer_error(404, "Repository not found", X_Error_Code="RepoNotFound")
            return None
        if for_writing and not found.is_writable:
            self.answer_error(403, "You don't have the rights to write here")
            return None
        return found

    def who_am_i(self, request):
        if self.has_token():
            role = "read" if self.headers["Authorization"].endswith(READ_TOKEN) else "write"
            self.answer_json({"name": "writer", "type": "user", "auth": {"accessToken": {"role": role}}})

    def create(self, request):
        if not self.has_token():
            return
        wanted = json.loads(request.body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "others":
            self.answer_error(403, "You don't have the rights to create a model under the namespace others")
        elif repo_id in self.server.repositories:
            self.answer_error(409, "You already created this model repo")
        else:
            # Older clients say `private`.
            is_private = wanted.get("visibility") == "private" or wanted.get("private", False)
            self.server.repositories[repo_id] = Repository(is_private)
            self.answer_json({"url": f"{self.server.endpoint}/{repo_id}"})

    def info(self, request, repo_id, branch=None):
        if repository := self.repository(repo_id):
            commits = repository.branches[branch or "main"]
            siblings = [{"rfilename": path} for path in sorted(commits[-1])]
            sha = _commit_id(repo_id, branch or "main", len(commits))
            self.answer_json(
                {"id": repo_id, "private": repository.is_private, "sha": sha, "siblings": siblings, "tags": []}
            )

    def create_branch(self, request, repo_id, branch):
        if repository := self.repository(repo_id, for_writing=True):
            if branch in repository.branches:
                self.answer_error(409, "Reference already exists")
                return
            repository.branches[branch] = list(repository.branches["main"])
            self.answer_json({})

    def preupload(self, request, repo_id, branch):
        if repository := self.repository(repo_id, for_writing=True):
            asked = json.loads(request.body)
            ignored = asked.get("gitIgnore", repository.gitignore).split()
            there = repository.branches[branch][-1]
            self.answer_json({"files": [self.upload_mode(file, there, ignored) for file in asked["files"]]})

    def upload_mode(self, file, there, ignored):
        path = file["path"]
        mode = "lfs" if path.endswith((".safetensors", ".png")) else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": path in ignored}
        if path in there:
            answer["oid"] = sha256(there[path]) if mode == "lfs" else git_id(there[path])
        return answer

    def batch(self, request, repo_id):
        if self.repository(repo_id, for_writing=True):
            asked = json.loads(request.body)["objects"]
            self.answer_json({"transfer": "basic", "objects": [self.actions(thing) for thing in asked]})

    def actions(self, thing):
        """Return where to put a large file, unless it is here."""
        oid, size, endpoint = thing["oid"], thing["size"], self.server.endpoint
        if oid in self.server.objects:
            return thing
        if size > self.server.quota_bytes:
            return {**thing, "error": {"code": 403, "message": "Storage quota exceeded"}}
        upload = {"href": f"{endpoint}/objects/{oid}?X-Signature=secret"}
        if size > PART_BYTES:
            numbers = range(1, -(-size // PART_BYTES) + 1)
            parts = {str(number): f"{endpoint}/objects/{oid}/{number}?X-Signature=secret" for number in numbers}
            upload = {
                "href": f"{endpoint}/objects/{oid}/complete?X-Signature=secret",
                "header": {"chunk_size": str(PART_BYTES), **parts},
            }
        return {**thing, "actions": {"upload": upload, "verify": {"href": f"{endpoint}/verify"}}}

    def put_object(self, request, oid):
        self.server.objects[oid] = request.body
        self.answer(200)

    def put_part(self, request, oid, number):
        self.server.parts.setdefault(oid, {})[int(number)] = request.body
        self.answer(200, ETag=f'"{number}"')

    def complete(self, request, oid):
        parts = self.server.parts.pop(oid)
        self.server.objects[oid] = b"".join(parts[part["partNumber"]] for part in json.loads(request.body)["parts"])
        self.answer(200)

    def verify(self, request):
        asked = json.loads(request.body)
        content = self.server.objects.get(asked["oid"], b"")
        is_whole = sha256(content) == asked["oid"] and len(content) == asked["size"]
        self.answer_json({}, 200 if is_whole else 422)

    def commit(self, request, repo_id, branch):
        repository = self.repository(repo_id, for_writing=True)
        if repository is None:
            return
        files = dict(repository.branches[branch][-1])
        for line in request.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        repository.branches[branch].append(files)
        oid = _commit_id(repo_id, branch, len(repository.branches[branch]))
        self.answer_json({"commitUrl": f"{self.server.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid})

    def validate(self, request):
        if not self.has_token():
            return
        problems = ["base_model must exist"] if "no/such-model" in json.loads(request.body)["content"] else []
        errors = [{"message": problem} for problem in problems]
        self.answer_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def tree(self, request, repo_id, branch):
        if repository := self.repository(repo_id):
            files = self.at(repository, repo_id, branch)
            self.answer_json(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
                    for path, content in sorted(files.items())
                ]
            )

    def at(self, repository, repo_id, revision):
        """Return the files at a branch or commit."""
        if revision in repository.branches:
            return repository.branches[revision][-1]
        return next(
            files
            for branch, commits in repository.branches.items()
            for number, files in enumerate(commits, start=1)
            if _commit_id(repo_id, branch, number) == revision
        )

    def resolve(self, request, repo_id, revision, path):
        if repository := self.repository(repo_id):
            content = self.at(repository, repo_id, revision).get(path)
            if content is None:
                self.answer_error(404, "Entry not found", X_Error_Code="EntryNotFound")
                return
            commit = (
                revision if len(revision) == 40 else _commit_id(repo_id, revision, len(repository.branches[revision]))
            )
            self.answer(200, content, ETag=f'"{git_id(content)}"', X_Repo_Commit=commit)


_ID = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", _Handler.who_am_i),
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", f"/api/models/{_ID}", _Handler.info),
    ("GET", f"/api/models/{_ID}/revision/(.+)", _Handler.info),
    ("POST", f"/api/models/{_ID}/branch/(.+)", _Handler.create_branch),
    ("POST", f"/api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/{_ID}.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/objects/(\\w+)", _Handler.put_object),
    ("PUT", "/objects/(\\w+)/(\\d+)", _Handler.put_part),
    ("POST", "/objects/(\\w+)/complete", _Handler.complete),
    ("POST", "/verify", _Handler.verify),
    ("POST", f"/api/models/{_ID}/commit/(.+)", _Handler.commit),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", f"/api/models/{_ID}/tree/(.+)", _Handler.tree),
    ("GET", f"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("HEAD", f"/{_ID}/resolve/([^/]+)/(.+)", _Handler.resolve),
)


def _commit_id(repo_id, branch, number):
    return hashlib.sha1(f"{repo_id} {branch} {number}".encode()).hexdigest()


def sha256(content: bytes) -> str:
    """Return the name of a large file."""
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    """Return the name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
