"""A process with the real huggingface_hub client and this package, told of a loopback Hub by its environment.

The client reads ``HF_ENDPOINT`` when it is imported, so it lives in a process of its own, which runs what a test sends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from tests.zoo.hub_server import TOKEN

CHILD = """
import contextlib, io, json, sys, traceback, warnings
import torch
torch.set_num_threads(1)
import ivideogpt
warnings.simplefilter("error", UserWarning)
channel, sys.stdout = sys.stdout, sys.stderr
shared = {"ivideogpt": ivideogpt, "torch": torch}
for line in sys.stdin:
    code, values = json.loads(line)
    names = {**shared, **values}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "sent by the test", "exec"), names)
        answer = {"result": names.get("result")}
    except BaseException as error:
        answer = {"error": type(error).__name__, "text": str(error), "kinds": [c.__name__ for c in type(error).__mro__],
                  "trace": traceback.format_exc()}
    print(json.dumps({**answer, "printed": printed.getvalue()}), file=channel, flush=True)
"""


class ClientError(Exception):
    """What the client's code raised: ``kind`` its type, ``kinds`` the types that it is."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["text"])
        self.kind, self.kinds, self.trace = answer["error"], answer["kinds"], answer["trace"]


class HubClient:
    """Starts the process; :meth:`run` has it execute code and gives what it calls ``result``.

    Args:
        endpoint: of the Hub.
        home: folder of its cache.
        token: that it is logged in with, None for none.
        environment: more of it.
    """

    def __init__(self, endpoint: str, home: Path, token: str | None = TOKEN, **environment: str) -> None:
        self.home = home
        self.printed = ""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept |= {
            "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "20",
        }  # fmt: skip
        if token is not None:
            kept["HF_TOKEN"] = token
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / "stderr.txt"
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=kept | environment, cwd=home,
            )  # fmt: skip

    def send(self, code: str, **values: Any) -> None:
        """Has it begin with ``code``, in which the ``values`` are named."""
        assert self.process.stdin is not None
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        self.process.stdin.write(json.dumps([textwrap.dedent(code), plain]) + "\n")
        self.process.stdin.flush()

    def receive(self) -> Any:
        """What became of the code that was sent."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the client died: {self.log.read_text()[-3000:]}")
        answer = json.loads(line)
        self.printed = answer["printed"]
        if "error" in answer:
            raise ClientError(answer)
        return answer["result"]

    def run(self, code: str, **values: Any) -> Any:
        """Sends and receives."""
        self.send(code, **values)
        return self.receive()

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()
