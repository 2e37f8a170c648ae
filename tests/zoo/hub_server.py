"""A loopback Hugging Face Hub for tests: repositories in memory, the endpoints that the real client uses.

    python tests/zoo/hub_server.py   prints its address, then serves until its standard input closes

Within a test use :func:`serve`. The client must be told the address by ``HF_ENDPOINT`` before it is imported.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_loopback"
USER = "someone"


@dataclass
class Repository:
    """Commits, newest last, each a mapping of path to content; branches and tags point at commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], ref: str, message: str) -> str:
        parent = self.refs.get(ref, "")
        digests = {path: hashlib.sha256(data).hexdigest() for path, data in sorted(files.items())}
        oid = hashlib.sha1(f"{parent}{message}{digests}".encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.refs[ref] = oid
        self.messages.append(message)
        return oid

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        oid = self.refs.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


@dataclass
class Hub:
    """All repositories, uploaded large files, and a log of requests (method and path)."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    large_files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False) -> Repository:
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit(files, "main", "first")
        return repository


class Handler(BaseHTTPRequestHandler):
    hub: Hub  # HTTP/1.0, so that no connection outlives the server

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
            self.wfile.write(data)

    def error(self, status: int, code: str, message: str) -> None:
        self.reply(status, {"error": message}, self.command == "HEAD", X_Error_Code=code, X_Error_Message=message)

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
    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo_id: str) -> Repository | None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self.authorised):
            self.error(404 if self.authorised else 401, "RepoNotFound", "Repository not found")
            return None
        return repository

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.body()
        parts = path.strip("/").split("/")
        if self.command in ("POST", "PUT") and not self.authorised and not path.startswith(("/lfs/", "/api/validate")):
            return self.error(401, "", "Invalid credentials")
        if path == "/api/whoami-v2":
            return self.reply(200, {"name": USER, "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
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
        found = repository.files(revision)
        if verb == "tag":
            repository.refs[json.loads(body)["tag"]] = repository.refs[revision]
            return self.reply(200, {})
        if found is None:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        oid, files = found
        if verb == "revision":
            siblings = [{"rfilename": path} for path in files]
            return self.reply(200, {"id": repo_id, "sha": oid, "siblings": siblings, "private": repository.private})
        if verb == "tree":
            return self.reply(200, [self.tree_entry(path, data) for path, data in files.items()])
        if verb == "preupload":
            wanted = json.loads(body)["files"]
            modes = [
                {
                    "path": item["path"],
                    "uploadMode": "lfs" if item["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": blob_id(files[item["path"]]) if item["path"] in files else None,
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
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.large_files[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = repository.commit(files, revision, message)
        self.reply(200, {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid})

    @staticmethod
    def tree_entry(path: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
        if path.endswith(".safetensors"):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

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
        etag = hashlib.sha256(data).hexdigest() if path.endswith(".safetensors") else blob_id(data)
        headers = {
            "X_Repo_Commit": oid,
            "ETag": f'"{etag}"',
            "X_Linked_Etag": f'"{etag}"',
            "X_Linked_Size": str(len(data)),
        }
        return self.reply(200, data, self.command == "HEAD", **headers)


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
