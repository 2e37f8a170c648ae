"""An HTTP server of a folder for the tests of remote shard sets, with faults: it refuses, breaks off, lies, dawdles."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Server:
    """The faults of files by name, one for each of the next GET requests, and the names that were asked for."""

    url: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    seconds: float = 0.0
    """Time that a body takes."""


class _Handler(SimpleHTTPRequestHandler):
    server_state: Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass

    def do_GET(self) -> None:
        state, name = self.server_state, self.path.rpartition("/")[2]
        state.asked.append(name)
        fault = state.faults[name].pop(0) if state.faults.get(name) else ""
        if fault.isdigit():
            return self.send_error(int(fault))
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        if fault == "wrong":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault == "long":
            data += data
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if fault == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self.connection.close()
            elif state.seconds and name.endswith(".tar"):
                for part in range(10):
                    self.wfile.write(data[len(data) * part // 10 : len(data) * (part + 1) // 10])
                    self.wfile.flush()
                    time.sleep(state.seconds / 10)
            else:
                self.wfile.write(data)
        return None


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serves a folder on a free loopback port while inside."""
    state = Server()
    handler = partial(type("Bound", (_Handler,), {"server_state": state}), directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
