"""A loopback Hugging Face Hub for tests: repositories in memory, the endpoints that the real client uses, and faults.

    python tests/zoo/hub_server.py   prints its address, then serves until its standard input closes

Within a test use :func:`serve`. The client must be told the address by ``HF_ENDPOINT`` before it is imported.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopbacktoken"
READ_TOKEN = "hf_loopbackreadonly"
USER = "someone"


@dataclass
class Repository:
    """Commits, newest last, each a mapping of path to content; branches and tags point at commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    claimed_sizes: dict[str, int] = field(default_factory=dict)  # of files that the listing lies about

    def commit(self, files: dict[str, bytes], branch: str, message: str) -> str:
        parent = self.branches.get(branch, "")
        digests = {path: hashlib.sha256(data).hexdigest() for path, data in sorted(files.items())}
        oid = hashlib.sha1(f"{parent}{message}{digests}".encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        return (oid, self.commits[oid]) if oid in self.commits else None

    @property
    def main(self) -> dict[str, bytes]:
        """Files of the main branch."""
        found = self.files()
        assert found is not None
        return found[1]


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests that match.

    Attributes:
        request: pattern for ``METHOD /path``.
        times: how often.
        status: of the answer; None for the ordinary one.
        retry_after: seconds, sent with the status.
        cut_after: bytes of the body, received (PUT) or sent (GET), after which the connection is cut.
        wait: set when the fault happens; the server then holds the connection until ``go_on`` is set.
    """

    request: str
    times: int = 1
    status: int | None = None
    retry_after: int | None = None
    cut_after: int | None = None
    wait: threading.Event | None = None
    go_on: threading.Event = field(default_factory=threading.Event)


@dataclass
class Hub:
    """All repositories, uploaded large files, a log of requests (method and path), and faults to come."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)  # every body
    sent: dict[str, int] = field(default_factory=dict)  # bytes of files, by path
    endpoint: str = ""

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repository:
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit(files, "main", "first")
        return repository

    def fault(self, request: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.request, request):
                fault.times -= 1
                return fault
        return None


class Handler(BaseHTTPRequestHandler):
    hub: Hub  # HTTP/1.0, so that no connection outlives the server
    cut_after: int | None = None

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass

    def reply(self, status: int, body: bytes | Any = b"", head_only: bool = False, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not head_only:
            self.wfile.write(data[: self.cut_after])

    def error(self, status: int, code: str, message: str, **headers: str) -> None:
        headers |= {"X_Error_Code": code, "X_Error_Message": message}
        self.reply(status, {"error": message}, self.command == "HEAD", **headers)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def repository(self, repo_id: str) -> Repository | None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.token not in (TOKEN, READ_TOKEN)):
            self.error(404 if self.token == TOKEN else 401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        fault = self.hub.fault(request)
        if fault is not None:
            if fault.wait is not None:
                fault.wait.set()
                fault.go_on.wait(60)
                return None
            if fault.cut_after is not None and self.command in ("PUT", "POST"):
                self.rfile.read(fault.cut_after)
                self.connection.shutdown(2)
                return None
            self.cut_after = fault.cut_after
        body = self.body()
        self.hub.received.append(body)
        if fault is not None and fault.status is not None:
            extra = {} if fault.retry_after is None else {"Retry_After": str(fault.retry_after)}
            return self.error(fault.status, "", f"fault {fault.status}", **extra)
        parts = path.strip("/").split("/")
        if self.command in ("POST", "PUT") and not path.startswith(("/lfs/", "/api/validate")) and self.token != TOKEN:
            if self.token == READ_TOKEN:
                return self.error(403, "", "you only have read access")
            return self.error(401, "", "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return self.reply(200, {"name": USER, "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            broken = b"base_model_relation: nonsense" in body
            return self.reply(400 if broken else 200, {"errors": [{"message": "no"}] if broken else [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if parts[0] == "lfs":
            return self.large_file(parts[1], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if parts[0] == "datasets":  # data sets are repositories as models are, under a prefix
            parts = parts[1:]
        if parts[:2] in (["api", "models"], ["api", "datasets"]):
            return self.api("/".join(parts[2:4]), parts[4:], body)
        if parts[2:3] == ["resolve"]:
            return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self.error(404, "", f"no endpoint {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815 - the base class's names

    def create(self, request: dict[str, Any]) -> None:
        repo_id = f"{request.get('organization') or USER}/{request['name']}"
        url = f"{self.hub.endpoint}/{repo_id}"
        if not repo_id.startswith(f"{USER}/"):
            return self.error(403, "", "You don't have the rights to create a model under this namespace")
        if repo_id in self.hub.repositories:
            return self.reply(409, {"error": "You already created this model repo", "url": url})
        private = request.get("visibility") == "private" or request.get("private", False)
        self.hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private)
        return self.reply(200, {"url": url, "name": repo_id})

    def large_file(self, oid: str, body: bytes) -> None:
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                return self.error(400, "", "wrong hash")
            self.hub.large_files[oid] = body
        elif oid not in self.hub.large_files:
            return self.error(404, "", "not uploaded")
        return self.reply(200, {})

    def batch(self, request: dict[str, Any]) -> None:
        url = f"{self.hub.endpoint}/lfs"
        objects = []
        for item in request["objects"]:
            oid = item["oid"]
            actions = {"upload": {"href": f"{url}/{oid}", "header": {}}, "verify": {"href": f"{url}/{oid}"}}
            objects.append({**item, **({} if oid in self.hub.large_files else {"actions": actions})})
        self.reply(200, {"transfer": "basic", "objects": objects})

    def api(self, repo_id: str, rest: list[str], body: bytes) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return None
        verb, revision = ([*rest, "revision", "main"])[:2] if rest else ("revision", "main")
        if verb == "refs":
            refs = {
                kind: [
                    {"name": name, "ref": f"refs/{where}/{name}", "targetCommit": oid} for name, oid in found.items()
                ]
                for kind, where, found in (
                    ("branches", "heads", repository.branches),
                    ("tags", "tags", repository.tags),
                )
            }
            return self.reply(200, {**refs, "converts": []})
        if verb == "branch":
            if revision in repository.branches:
                return self.error(409, "", "Reference already exists")
            repository.branches[revision] = repository.branches["main"]
            return self.reply(200, {})
        found = repository.files(revision)
        if found is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        oid, files = found
        if verb == "tag":
            if json.loads(body)["tag"] in repository.tags:
                return self.error(409, "", "Tag already exists")
            repository.tags[json.loads(body)["tag"]] = oid
            return self.reply(200, {})
        if verb == "revision":
            rows = [tree_entry(repository, path, data) for path, data in files.items()]
            siblings = [{**row, "rfilename": row["path"], "blobId": row["oid"]} for row in rows]
            return self.reply(200, {"id": repo_id, "sha": oid, "siblings": siblings, "private": repository.private})
        if verb == "tree":
            return self.reply(200, [tree_entry(repository, path, data) for path, data in files.items()])
        if verb == "preupload":
            wanted = json.loads(body)["files"]
            modes = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": identifier(item["path"], files[item["path"]]) if item["path"] in files else None,
                }
                for item in wanted
            ]
            return self.reply(200, {"files": modes})
        if verb == "commit":
            return self.commit(repo_id, repository, revision, dict(files), body)
        return self.error(404, "", f"no endpoint {verb}")

    def commit(self, repo_id: str, repository: Repository, revision: str, files: dict[str, bytes], body: bytes) -> None:
        message = ""
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", repository.branches[revision]) != repository.branches[revision]:
                    return self.error(412, "", "A commit has happened since")
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = repository.commit(files, revision, message)
        return self.reply(200, {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return None
        found = repository.files(revision)
        if found is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        oid, files = found
        if path not in files:
            return self.error(404, "EntryNotFound", "Entry not found")
        data = files[path]
        headers = {
            "X_Repo_Commit": oid,
            "ETag": f'"{identifier(path, data)}"',
            "X_Linked_Etag": f'"{identifier(path, data)}"',
            "X_Linked_Size": str(repository.claimed_sizes.get(path, len(data))),
            "Accept_Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status, part = 200, data
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(data) - 1)
            status, part = 206, data[first : last + 1]
            headers["Content_Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        if self.command == "GET":
            sent = len(part) if self.cut_after is None else min(len(part), self.cut_after)
            self.hub.sent[path] = self.hub.sent.get(path, 0) + sent
        return self.reply(status, part, self.command == "HEAD", **headers)


LARGE = (".safetensors", ".gif", ".bin")


def tree_entry(repository: Repository, path: str, data: bytes) -> dict[str, Any]:
    size = repository.claimed_sizes.get(path, len(data))
    entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": blob_id(data)}
    if path.endswith(LARGE):
        entry["lfs"] = {
            "oid": identifier(path, data),
            "sha256": identifier(path, data),
            "size": size,
            "pointerSize": 134,
        }
    return entry


def identifier(path: str, data: bytes) -> str:
    """What the Hub calls a file's content: SHA-256 for large files, git's hash for others."""
    return hashlib.sha256(data).hexdigest() if path.endswith(LARGE) else blob_id(data)


def blob_id(data: bytes) -> str:
    """Identifier that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextlib.contextmanager
def serve(hub: Hub | None = None) -> Iterator[Hub]:
    """Serves ``hub`` on a free loopback port while inside; its ``endpoint`` says where."""
    hub = hub or Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    with serve() as running:
        print(running.endpoint, flush=True)
        sys.stdin.read()
