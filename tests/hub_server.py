"""A server on loopback that speaks the part of the Hub's API that huggingface_hub's client uses for models, and what
`datasets.load_dataset` reads.

Repositories live in memory, datasets under "datasets/owner/name": a list of commits, each a dict of path to bytes.
Uploads go the Hub's way: preupload says which files are large, these are announced to the LFS endpoint and PUT, then
one commit names all of them. Downloads are HEAD and GET of `resolve`, with etags and ranges. `fail` makes the server
misbehave at a place, once or more often.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


LARGE = (".safetensors", ".bin", ".png", ".parquet")  # what the Hub keeps in LFS


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """A new commit on a branch; its number is a hash of all that came before."""
        before = self.branches.get(branch, "")
        digest = hashlib.sha1(f"{before}{branch}{len(self.commits)}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        self.commits[digest.hexdigest()] = files
        self.branches[branch] = digest.hexdigest()
        return digest.hexdigest()

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer:
    """`HubServer()` listens at once; `url` is its endpoint. State is cleared by `reset`."""

    def __init__(self) -> None:
        hub = self

        class Handler(_Handler):
            server_state = hub

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                """Connections that we or the client cut are part of the tests."""

        self.lock = threading.RLock()
        self.reset()
        self.http = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def reset(self) -> None:
        with self.lock:
            self.repos: dict[str, Repo] = {}
            self.objects: dict[str, bytes] = {}  # LFS, by SHA-256
            self.tokens = {"writes": "write", "reads": "read"}  # token -> right
            self.requests: list[str] = []
            self.failures: list[tuple[re.Pattern[str], int | str, int]] = []
            self.on: dict[str, Callable[[], None]] = {}  # substring of a request -> called once before it is answered

    def fail(self, request: str, how: int | str, times: int = 1) -> None:
        """Answer requests that match ("GET .*resolve.*") with a status, "cut" them in the middle, or "corrupt" them."""
        self.failures.append((re.compile(request), how, times))

    def failure(self, request: str) -> int | str | None:
        with self.lock:
            for i, (pattern, how, times) in enumerate(self.failures):
                if times and pattern.search(request):
                    self.failures[i] = (pattern, how, times - 1)
                    return how
        return None

    def add(self, repo_id: str, files: dict[str, bytes], *, private: bool = False, branch: str = "main") -> str:
        """Put a commit into a repository, as somebody else would; returns its number."""
        with self.lock:
            repo = self.repos.setdefault(repo_id, Repo(private))
            head = repo.branches.get(branch)
            return repo.commit(branch, {**(repo.commits[head] if head else {}), **files})

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.find(revision) or ""]


class _Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _error(self, status: int, message: str, code: str = "") -> None:
        self._answer(status, {"error": message}, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def _handle(self) -> None:
        hub = self.server_state
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        hub.requests.append(request)
        for part in [p for p in hub.on if p in request]:
            hub.on.pop(part)()
        self.how = hub.failure(request)
        if isinstance(self.how, int):
            self._error(self.how, "the test says so")
            return
        with hub.lock:
            for method, pattern, action in ROUTES:
                found = re.fullmatch(pattern, path)
                if self.command in method and found:
                    action(self, **found.groupdict())
                    return
        self._error(404, f"no such endpoint: {request}")

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    # ---- rights ----

    def _right(self) -> str | None:
        """ "read", "write", None without a token; answers 401 to a wrong one, and then returns ""."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if not token:
            return None
        if token not in self.server_state.tokens:
            self._error(401, "Invalid credentials in Authorization header")
            return ""
        return self.server_state.tokens[token]

    def _repo(self, repo: str, write: bool = False) -> Repo | None:
        right = self._right()
        if right == "":
            return None
        found = self.server_state.repos.get(repo)
        if found is None or (found.private and right is None):
            self._error(401 if right is None else 404, "Repository not found", "RepoNotFound")
            return None
        if write and right != "write":
            self._error(401 if right is None else 403, "You don't have the required permissions")
            return None
        return found

    # ---- the API ----

    def create(self) -> None:
        right = self._right()
        if right == "":
            return
        if right != "write":
            self._error(401 if right is None else 403, "You don't have the rights to create a model")
            return
        values = json.loads(self.body)
        name = f"{values.get('organization') or 'me'}/{values['name']}"
        url = {"url": f"{self.server_state.url}/{name}", "name": name, "id": name}
        if name in self.server_state.repos:
            self._answer(409, {"error": "You already created this model repo", **url})
            return
        repo = self.server_state.repos[name] = Repo(
            values.get("visibility") == "private" or values.get("private") is True
        )
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._answer(200, url)

    def branch(self, repo: str, branch: str) -> None:
        if (found := self._repo(repo, write=True)) is None:
            return
        if branch in found.branches:
            self._error(409, "Reference already exists")
            return
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        found.branches[branch] = found.find(start) or ""
        self._answer(200, {})

    def info(self, repo: str, revision: str = "main") -> None:
        if (found := self._repo(repo)) is None:
            return
        if (sha := found.find(revision)) is None:
            self._error(404, "Invalid rev id", "RevisionNotFound")
            return
        siblings = [{"rfilename": path} for path in found.commits[sha]]
        self._answer(200, {"id": repo, "modelId": repo, "sha": sha, "private": found.private, "siblings": siblings})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        if (found := self._repo(repo)) is None:
            return
        if (sha := found.find(revision)) is None:
            self._error(404, "Invalid rev id", "RevisionNotFound")
            return
        entries: list[dict[str, Any]] = []
        start, deep = f"{folder}/" if folder else "", "recursive=true" in urlsplit(self.path).query.lower()
        inside = {p: c for p, c in found.commits[sha].items() if p.startswith(start)}
        if folder and not inside:
            self._error(404, "Entry not found", "EntryNotFound")
            return
        if not deep:  # what lies in folders is a folder
            folders = {start + p.removeprefix(start).split("/")[0] for p in inside if "/" in p.removeprefix(start)}
            entries += [{"type": "directory", "path": p, "oid": _oid(p.encode()), "size": 0} for p in sorted(folders)]
            inside = {p: c for p, c in inside.items() if "/" not in p.removeprefix(start)}
        for path, content in inside.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._answer(200, entries)

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        errors = []
        if match:
            data = yaml.safe_load(match[1])
            if not isinstance(data, dict):
                errors.append({"message": "metadata must be an object"})
            elif "/" not in str(data.get("base_model", "a/b")):
                errors.append({"message": '"base_model" must be the id of a model'})
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if (found := self._repo(repo, write=True)) is None:
            return
        there = found.commits.get(found.find(revision) or "", {})
        self._answer(
            200,
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": _remote_oid(file["path"], there),
                    }
                    for file in json.loads(self.body)["files"]
                ]
            },
        )

    def batch(self, repo: str) -> None:
        if self._repo(repo, write=True) is None:
            return
        answers = []
        for item in json.loads(self.body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server_state.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.server_state.url}/lfs/{item['oid']}", "header": {}},
                    "verify": {"href": f"{self.server_state.url}/verify/{repo}", "header": {}},
                }
            answers.append(answer)
        self._answer(200, {"transfer": "basic", "objects": answers})

    def put(self, oid: str) -> None:
        if self.how == "cut":
            self.close_connection = True
            self.connection.close()
            return
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._error(400, "the content does not have this hash")
            return
        self.server_state.objects[oid] = self.body
        self._answer(200)

    def verify(self, repo: str) -> None:
        known = json.loads(self.body)["oid"] in self.server_state.objects
        self._answer(200 if known else 404, {})

    def commit(self, repo: str, revision: str) -> None:
        if (found := self._repo(repo, write=True)) is None:
            return
        if (head := found.find(revision)) is None:
            self._error(404, "Invalid rev id", "RevisionNotFound")
            return
        files = dict(found.commits[head])
        for line in self.body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header" and value.get("parentCommit") not in (None, head):
                self._error(412, "A commit has happened since. Please refresh and try again.")
                return
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.server_state.objects:
                    self._error(400, "the LFS object was never uploaded")
                    return
                files[value["path"]] = self.server_state.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        oid = found.commit(revision, files)
        self._answer(
            200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server_state.url}/{repo}/commit/{oid}"}
        )

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self._repo(repo)) is None:
            return
        if (sha := found.find(revision)) is None:
            self._error(404, "Invalid rev id", "RevisionNotFound")
            return
        content = found.commits[sha].get(path)
        if content is None:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        etag = hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else _oid(content)
        start = int(re.findall(r"bytes=(\d+)-", self.headers.get("Range") or "bytes=0-")[0])
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        part = content[start:]
        if self.how == "corrupt":
            part = part[:-1] + bytes([part[-1] ^ 1])
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers["Content_Length"] = str(len(part))
        if self.how == "cut" and self.command == "GET":
            part = part[: len(part) // 2]
            self.close_connection = True
        self._answer(206 if start else 200, part, **headers)
        if self.close_connection:
            self.wfile.flush()
            time.sleep(0.01)
            self.connection.close()


def _oid(content: bytes) -> str:
    """Git's hash of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _remote_oid(path: str, files: dict[str, bytes]) -> str | None:
    if path not in files:
        return None
    return hashlib.sha256(files[path]).hexdigest() if path.endswith(LARGE) else _oid(files[path])


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ANY = r"(?P<repo>(?:datasets/)?[\w.-]+/[\w.-]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("POST",), rf"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    (("POST",), rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    (("POST",), rf"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    (("GET",), rf"/api/(?:models/)?{_ANY}/revision/(?P<revision>.+)", _Handler.info),
    (("GET",), rf"/api/(?:models/)?{_ANY}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    (("GET",), rf"/api/(?:models/)?{_ANY}", _Handler.info),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", _Handler.put),
    (("POST",), rf"/verify/{_REPO}", _Handler.verify),
    (("GET", "HEAD"), rf"/{_ANY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
