"""A small Hugging Face Hub on loopback: enough of the protocol for the real client's pull and push.

    with Hub() as hub:
        commit = hub.upload("org/repo", {"config.json": b"{}"})
        hub.tag("org/repo", "v1", commit)
        ...                                 # a client with HF_ENDPOINT=hub.url
        hub.requests                        # ["HEAD /org/repo/resolve/main/config.json", ...]

    hub.fail("PUT /lfs/.*", "drop")         # the next such request ends in the middle
    hub.fail("GET /api/.*", 500)            # or in an error; a client may POST /test/faults too

Models only. Files of LARGE bytes and more are "LFS": they are uploaded to an address of their own,
and `resolve` redirects to another one, as on the real Hub. Errors carry X-Error-Code.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import yaml

LARGE = 1024
TOKEN, READ_TOKEN = "hf_loopback", "hf_may_only_read"
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "other"}

Files = dict[str, bytes]


@dataclass
class Repo:
    """Commits, and the names that point to them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, changes: Files, branch: str = "main") -> str:
        """Add files on top of a branch; returns the commit's id."""
        files = {**self.commits.get(self.refs.get(branch, ""), {}), **changes}
        what = [
            len(self.commits),
            sorted((p, hashlib.sha1(b).hexdigest()) for p, b in files.items()),
        ]
        oid = hashlib.sha1(json.dumps(what).encode()).hexdigest()
        self.commits[oid] = files
        self.refs[branch] = oid
        return oid


class HubError(Exception):
    """An answer other than 200, with the header that the client reads."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The server and what it holds; use as a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        """Large files by their sha256."""
        self.requests: list[str] = []
        """Method, path and, where there is one, range."""
        self.faults: list[tuple[str, int | str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # another host, as the client follows a redirect within one host at once
        self.cdn_url = f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, repo_id: str, private: bool = False, gated: bool = False) -> Repo:
        return self.repos.setdefault(repo_id, Repo(private, gated))

    def fail(self, pattern: str, how: int | str) -> None:
        """Let the next request "METHOD /path" that matches fail: a status, or "drop"."""
        self.faults.append((pattern, how))

    def fault(self, request: str) -> int | str | None:
        """How this request is to fail, which is then done with; None: it is not."""
        for index, (pattern, how) in enumerate(self.faults):
            if re.fullmatch(pattern, request):
                del self.faults[index]
                return how
        return None

    def upload(self, repo_id: str, files: Files, branch: str = "main") -> str:
        self.blobs.update({_sha256(data): data for data in files.values() if len(data) >= LARGE})
        return self.create(repo_id).commit(files, branch)

    def tag(self, repo_id: str, name: str, commit: str) -> None:
        self.repos[repo_id].refs[name] = commit

    # ------------------------------------------------------------ what is asked

    def repo(self, repo_id: str, token: str | None) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (repo.private and token != TOKEN):
            # the real Hub does not tell a stranger whether a private repo exists
            status = 404 if token == TOKEN else 401
            raise HubError(status, "RepoNotFound", "Repository not found")
        return repo

    def files(self, repo_id: str, revision: str, token: str | None) -> tuple[str, Files]:
        repo = self.repo(repo_id, token)
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    def file(self, repo_id: str, revision: str, path: str, token: str | None) -> tuple[str, bytes]:
        commit, files = self.files(repo_id, revision, token)
        if self.repos[repo_id].gated and token != TOKEN:
            raise HubError(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        if path not in files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        return commit, files[path]

    def info(self, repo_id: str, revision: str, token: str | None) -> dict[str, Any]:
        commit, files = self.files(repo_id, revision, token)
        repo = self.repos[repo_id]
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {
            **{"_id": repo_id, "id": repo_id, "modelId": repo_id, "sha": commit, "tags": []},
            **{"private": repo.private, "gated": "auto" if repo.gated else False},
            **{"siblings": siblings, "downloads": 0, "likes": 0, "disabled": False},
        }

    def tree(self, repo_id: str, revision: str, under: str, token: str | None) -> list[Any]:
        _, files = self.files(repo_id, revision, token)
        prefix = f"{under.strip('/')}/" if under.strip("/") else ""
        found = {path: data for path, data in files.items() if path.startswith(prefix)}
        if prefix and not found:
            raise HubError(404, "EntryNotFound", f"{under} does not exist")
        return [_entry(path, data) for path, data in sorted(found.items())]

    def preupload(self, body: dict[str, Any]) -> dict[str, Any]:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                "shouldIgnore": False,
            }
            for file in body["files"]
        ]
        return {"files": modes}

    def lfs_batch(self, body: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for asked in body["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.blobs:
                answer["actions"] = {"upload": {"href": f"{self.url}/lfs/{asked['oid']}"}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def commit(self, repo_id: str, branch: str, body: bytes, token: str | None) -> dict[str, Any]:
        changes: Files = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                assert value["encoding"] == "base64"
                changes[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                changes[value["path"]] = self.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                raise AssertionError("nobody here deletes")
        may_write(token)
        oid = self.repo(repo_id, token).commit(changes, branch)
        return {
            "commitUrl": f"{self.url}/{repo_id}/commit/{oid}",
            "commitOid": oid,
            "success": True,
        }


def may_write(token: str | None) -> None:
    if token == READ_TOKEN:
        raise HubError(403, "", "You don't have the rights to do this.")
    if token != TOKEN:
        raise HubError(401, "", "Invalid username or password.")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
    if len(data) >= LARGE:
        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_request(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        request, asked = f"{self.command} {path}", self.headers.get("Range")
        hub.requests.append(f"{request} {asked}" if asked else request)
        fault, size = hub.fault(request), int(self.headers.get("Content-Length") or 0)
        self.dropping = fault == "drop"
        if self.dropping and size:
            self.rfile.read(size // 2)
            self.hang_up()
            return
        body = self.rfile.read(size)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        try:
            if isinstance(fault, int):
                raise HubError(fault, "", "as the test asked")
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    answer(self, hub, token, body, *match.groups())
                    return
            raise HubError(404, "", f"no such address: {path}")
        except HubError as err:
            headers = {
                "X-Error-Message": str(err),
                **({"X-Error-Code": err.code} if err.code else {}),
            }
            self.send(json.dumps({"error": str(err)}).encode(), err.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.dropping:
            self.wfile.write(data[: len(data) // 2])
            self.hang_up()
        elif self.command != "HEAD":
            self.wfile.write(data)

    def hang_up(self) -> None:
        """Close in the middle of whatever was said."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def send_json(self, value: Any) -> None:
        self.send(json.dumps(value).encode())

    def send_bytes(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if asked is None:
            self.send(data, 200, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send(data[first : last + 1], 206, headers)


def _resolve(h: _Handler, hub: Hub, token: str | None, _: bytes, *where: str) -> None:
    commit, data = hub.file(*where, token)
    if len(data) < LARGE:
        h.send_bytes(data, {"X-Repo-Commit": commit, "ETag": f'"{_git_oid(data)}"'})
        return
    linked = {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
    location = f"{hub.cdn_url}/cdn/{_sha256(data)}"
    h.send(b"", 302, {"X-Repo-Commit": commit, "Location": location, **linked})


def _create(h: _Handler, hub: Hub, token: str | None, body: bytes) -> None:
    may_write(token)
    asked = json.loads(body)
    repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
    answer = {"url": f"{hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
    if repo_id in hub.repos:
        h.send(json.dumps({**answer, "error": "You already created it"}).encode(), 409)
        return
    hub.create(repo_id, private=asked.get("visibility") == "private").commit({})
    h.send_json(answer)


def _create_branch(h: _Handler, hub: Hub, token: str | None, _: bytes, *where: str) -> None:
    may_write(token)
    repo_id, branch = where
    refs = hub.repo(repo_id, token).refs
    if branch in refs:
        raise HubError(409, "", "Reference already exists")
    refs[branch] = refs["main"]
    h.send_json({})


def _paths_info(h: _Handler, hub: Hub, token: str | None, body: bytes, *where: str) -> None:
    _, files = hub.files(*where, token)
    asked = [unquote(value) for name, value in parse_qsl(body.decode()) if name == "paths"]
    h.send_json([_entry(path, files[path]) for path in asked if path in files])


def _validate_yaml(h: _Handler, hub: Hub, _: str | None, body: bytes) -> None:
    """Some of what the real Hub checks: a front matter, and a license that it knows."""
    found = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
    metadata = yaml.safe_load(found[1]) if found else None
    license = metadata.get("license") if isinstance(metadata, dict) else None
    if license not in {None, *LICENSES}:
        h.send(f'"license" must be one of {sorted(LICENSES)}'.encode(), 400)
        return
    h.send_json({"errors": [], "warnings": []})


def _take_faults(h: _Handler, hub: Hub, _: str | None, body: bytes) -> None:
    """A test's client says what is to fail next, and learns what was asked since it last did."""
    asked, hub.requests[:] = hub.requests[:-1], []
    hub.faults[:] = [tuple(fault) for fault in json.loads(body)]
    h.send_json(asked)


def _put(h: _Handler, hub: Hub, _: str | None, body: bytes, oid: str) -> None:
    if _sha256(body) != oid:
        raise HubError(400, "", "content does not have the hash it was announced with")
    hub.blobs[oid] = body
    h.send(b"")


_ID = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", _resolve),
    ("GET HEAD", r"/cdn/(\w+)", lambda h, hub, t, b, oid: h.send_bytes(hub.blobs[oid], {})),
    ("GET", rf"/api/models/{_ID}", lambda h, hub, t, b, r: h.send_json(hub.info(r, "main", t))),
    (
        "GET",
        rf"/api/models/{_ID}/revision/([^/]+)",
        lambda h, hub, t, b, r, rev: h.send_json(hub.info(r, rev, t)),
    ),
    (
        "GET",
        rf"/api/models/{_ID}/tree/([^/]+)(/.*)?",
        lambda h, hub, t, b, r, rev, under: h.send_json(hub.tree(r, rev, under or "", t)),
    ),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate_yaml),
    ("POST", "/test/faults", _take_faults),
    ("POST", rf"/api/models/{_ID}/branch/([^/]+)", _create_branch),
    ("POST", rf"/api/models/{_ID}/paths-info/([^/]+)", _paths_info),
    (
        "POST",
        rf"/api/models/{_ID}/preupload/([^/]+)",
        lambda h, hub, t, b, *_: h.send_json(hub.preupload(json.loads(b))),
    ),
    (
        "POST",
        rf"/api/models/{_ID}/commit/([^/]+)",
        lambda h, hub, t, b, r, rev: h.send_json(hub.commit(r, rev, b, t)),
    ),
    (
        "POST",
        rf"/{_ID}\.git/info/lfs/objects/batch",
        lambda h, hub, t, b, r: h.send_json(hub.lfs_batch(json.loads(b))),
    ),
    ("PUT", r"/lfs/(\w+)", _put),
    (
        "GET",
        "/api/whoami-v2",
        lambda h, *_: h.send_json({"name": "me", "type": "user", "orgs": [{"name": "org"}]}),
    ),
]
