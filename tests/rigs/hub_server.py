"""A model hub of this machine: the routes of huggingface_hub, with the real one's codes and headers.

Written after huggingface_hub 2.4. Large files go through LFS: hashed, put without a token, verified, and
served by a redirect to another host name (localhost, not 127.0.0.1), as the real one does through its CDN.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

FRONT = re.compile(r"---\n(.*?)\n---", re.DOTALL)
LARGE = (".safetensors", ".gguf")


@dataclass
class Repo:
    """Commits hold path -> content. Gated ones are open to the users in `granted`."""

    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Add files on top of a branch; the commit's id."""
        all_files = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        seed = repr((len(self.commits), sorted((n, hashlib.sha256(c).hexdigest()) for n, c in all_files.items())))
        oid = hashlib.sha1(seed.encode()).hexdigest()
        self.commits[oid], self.refs[ref] = all_files, oid
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.refs.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


class Hub(ThreadingHTTPServer):
    """Repositories, users by token, and what was asked: (method, path, token, host)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, str] = {}  # token -> name; one that begins with "reader" may not write
        self.large: dict[str, bytes] = {}  # sha256 -> content
        self.asked: list[tuple[str, str, str, str]] = []
        self.broken: dict[str, int] = {}  # a part of a path -> the status to answer with

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, files: dict[str, bytes], **kind: Any) -> Repo:
        """A repository with one commit."""
        self.repos[name] = Repo(**kind)
        self.repos[name].commit(files)
        return self.repos[name]

    def paths(self, method: str) -> list[str]:
        return [path for verb, path, _, _ in self.asked if verb == method]


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        path = urlsplit(self.path).path
        self.server.asked.append((self.command, path, token, self.headers.get("Host", "")))
        self.user = self.server.users.get(token)
        try:
            if token and self.user is None:
                raise Refused(401, message="Invalid credentials in Authorization header")
            for part, status in self.server.broken.items():
                if part in path:
                    raise Refused(status, message="broken on purpose")
            for method, pattern, route in ROUTES:
                if self.command in method and (found := re.fullmatch(pattern, path)):
                    return route(self, *map(unquote, found.groups()))
            raise Refused(404, "EntryNotFound", "Entry not found")
        except Refused as refused:
            told = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self._send(refused.status, {"error": refused.message}, {k: v for k, v in told.items() if v})

    def _send(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repo(self, name: str, *, write: bool = False, content: bool = False) -> Repo:
        """A repository that the user may see; `content` of a gated one is for whom it was granted to."""
        repo, owner = self.server.repos.get(name), name.split("/", maxsplit=1)[0]
        if repo is None or (repo.private and self.user != owner):
            raise Refused(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if content and repo.gated and self.user not in repo.granted:
            raise Refused(403 if self.user else 401, "GatedRepo", f"Access to model {name} is restricted.")
        if write and self.user != owner:
            raise Refused(403 if self.user else 401, message="You don't have the rights to write here")
        return repo

    def _at(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        found = repo.at(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def whoami(self) -> None:
        if self.user is None:
            raise Refused(401, message="Invalid credentials in Authorization header")
        self._send(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.user
        if self.user is None:
            raise Refused(401, message="Invalid username or password.")
        if owner != self.user or self.user.startswith("reader"):
            raise Refused(403, message=f'You don\'t have the rights to create a model under "{owner}"')
        name = f"{owner}/{asked['name']}"
        told = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if name in self.server.repos:
            return self._send(409, {"error": "You already created this model repo", **told})
        self.server.add(name, {".gitattributes": b""}, private=asked.get("visibility") == "private")
        return self._send(200, told)

    def validate(self) -> None:
        """What the Hub refuses of a card: YAML that is none, and values of another type than it knows."""
        errors: list[dict[str, str]] = []
        found = FRONT.match(json.loads(self.body)["content"])
        try:
            front = yaml.safe_load(found[1]) if found else {}
        except yaml.YAMLError as error:
            errors.append({"message": f"Invalid YAML: {error}"})
        else:
            lists = {"tags", "datasets"}
            for key, value in front.items():
                if not isinstance(value, list if key in lists else str | list):
                    errors.append({"message": f'"{key}" is of a wrong type'})
        self._send(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, name: str, revision: str = "main") -> None:
        repo = self._repo(name)
        oid, files = self._at(repo, revision)
        told = {"id": name, "sha": oid, "private": repo.private, "gated": "auto" if repo.gated else False}
        self._send(200, {**told, "siblings": [{"rfilename": path} for path in files], "tags": []})

    def tree(self, name: str, revision: str, folder: str = "") -> None:
        _, files = self._at(self._repo(name, content=True), revision)
        found = [path for path in files if path.startswith(folder)]
        if not found:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        entries = [{"type": "file", "path": path, "size": len(files[path]), "oid": blob(files[path])} for path in found]
        self._send(200, entries)

    def branch(self, name: str, branch: str) -> None:
        repo = self._repo(name, write=True)
        if branch in repo.refs:
            raise Refused(409, message="Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        self._send(200, {})

    def preupload(self, name: str, revision: str) -> None:
        _, files = self._at(self._repo(name, write=True), revision)
        found = []
        for asked in json.loads(self.body)["files"]:
            path, there = asked["path"], files.get(asked["path"])
            is_large = path.endswith(LARGE)
            oid = None if there is None else hashlib.sha256(there).hexdigest() if is_large else blob(there)
            mode = "lfs" if is_large else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._send(200, {"files": found})

    def batch(self, name: str) -> None:
        self._repo(name, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            verify = {"href": f"{self.server.url}/{name}.git/info/lfs/verify"}
            actions = {"upload": {"href": f"{self.server.url}/put/{asked['oid']}"}, "verify": verify}
            there = asked["oid"] in self.server.large
            objects.append({**asked, **({} if there else {"actions": actions})})
        self._send(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if self.headers.get("Authorization") or hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, message="a token where none belongs, or other content than was said")
        self.server.large[oid] = self.body
        self._send(200)

    def verify(self, name: str) -> None:
        self._repo(name, write=True)
        asked = json.loads(self.body)
        if len(self.server.large.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, message="Object does not exist")
        self._send(200, {})

    def commit(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        self._at(repo, revision)
        files: dict[str, bytes] = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.large:
                    raise Refused(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.large[value["oid"]]
        oid = repo.commit(files, revision)
        told = {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"}
        self._send(200, told)

    def resolve(self, name: str, revision: str, path: str) -> None:
        oid, files = self._at(self._repo(name, content=True), revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content, headers = files[path], {"X-Repo-Commit": oid}
        if not path.endswith(LARGE):
            return self._send(200, content, {**headers, "ETag": f'"{blob(content)}"'})
        digest = hashlib.sha256(content).hexdigest()
        self.server.large[digest] = content
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        to = f"http://localhost:{self.server.server_port}/cdn/{digest}"
        return self._send(302, b"", {**headers, **linked, "Location": to})

    def cdn(self, digest: str) -> None:
        self._send(200, self.server.large[digest], {"ETag": f'"{digest}"'})


def blob(content: bytes) -> str:
    """git's name of a file's content."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


NAME, REST = "([^/]+/[^/]+)", "([^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/{REST}", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/{REST}", Handler.tree),
    ("GET", f"/api/models/{NAME}/tree/{REST}/(.+)", Handler.tree),
    ("POST", f"/api/models/{NAME}/branch/{REST}", Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/{REST}", Handler.preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Handler.batch),
    ("POST", f"/{NAME}.git/info/lfs/verify", Handler.verify),
    ("PUT", "/put/([0-9a-f]+)", Handler.put),
    ("POST", f"/api/models/{NAME}/commit/{REST}", Handler.commit),
    ("GET HEAD", f"/{NAME}/resolve/{REST}/(.+)", Handler.resolve),
    ("GET HEAD", "/cdn/([0-9a-f]+)", Handler.cdn),
)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
