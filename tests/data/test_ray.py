"""A real Ray cluster on this machine makes the same bytes as one process, also when its processes are killed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ivideogpt.data.packing import pack

pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # starting a cluster takes some ten seconds

SHARD_BYTES = 30_000

SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
from ivideogpt.data.packing import pack

def ours(process):
    # whether this process started it, or one that it started: there may be other clusters on the machine
    while process > 1:
        if process == os.getpid():
            return True
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return False

def tasks():
    # processes of Ray that convert: it names them after the function
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"ray::_task" in line.read_bytes() and ours(int(line.parent.name)):
                yield int(line.parent.name)
        except OSError:
            pass

def kill_one():
    while True:
        for process in tasks():
            os.kill(process, signal.SIGKILL)
            print("killed", flush=True)
            return
        time.sleep(0.005)

if __name__ == "__main__":
    threading.Thread(target=kill_one, daemon=True).start()
    report = pack(sys.argv[1], sys.argv[2], shard_bytes=int(sys.argv[3]), engine="ray", workers=2, policy="skip")
    print("packed", report.episodes, len(report.quarantine), flush=True)
"""


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_a_killed_worker(tmp_path: Path) -> None:
    source = tmp_path / "npz"
    source.mkdir()
    rng = np.random.default_rng(0)
    for number in range(24):
        np.savez(source / f"e{number:03d}.npz", video=rng.integers(0, 256, (6, 24, 24, 3), dtype=np.uint8))
    (source / "bad.npz").write_bytes(b"no archive")
    script = tmp_path / "convert.py"
    script.write_text(SCRIPT)
    words = [sys.executable, str(script), str(source), str(tmp_path / "ray"), str(SHARD_BYTES)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if line.startswith(("killed", "packed"))]
    assert told == ["killed", "packed 24 1"]  # Ray itself tells of the death between them
    with pytest.warns(UserWarning, match="bad skipped"):
        pack(source, tmp_path / "one", shard_bytes=SHARD_BYTES, policy="skip")
    assert hashes(tmp_path / "ray") == hashes(tmp_path / "one")
