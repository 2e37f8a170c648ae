"""The cache of fetched files: checked, bounded, shared by processes, mended after faults and kills."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ivideogpt.data import file_cache
from ivideogpt.data.file_cache import FileCache, RemoteError, UnreachableError, is_url, read_small
from tests.data.file_server import Server, serving

SIZE = 40_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.tar").write_bytes(bytes([number]) * SIZE)
    with serving(folder) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_cache, "_FIRST_WAIT", 0.01)


def about(server: Server, number: int) -> tuple[str, int, str]:
    """URL, size and hash of a file."""
    return f"{server.url}/{number}.tar", SIZE, hashlib.sha256(bytes([number]) * SIZE).hexdigest()


def files(cache: FileCache) -> list[Path]:
    return [path for path in cache.folder.iterdir() if path.suffix != ".lock"]


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache")
    url, size, sha256 = about(server, 3)
    assert not cache.has(sha256)
    for _ in range(3):
        descriptor = cache.open(url, size, sha256)
        assert os.pread(descriptor, size + 1, 0) == bytes([3]) * SIZE
        os.close(descriptor)
    assert cache.has(sha256)
    assert server.asked == ["3.tar"]
    assert [path.name for path in files(cache)] == [sha256]


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "wrong"])
def test_what_fails_twice_is_asked_for_again(server: Server, tmp_path: Path, fault: str) -> None:
    cache = FileCache(tmp_path / "cache")
    server.faults["2.tar"] = [fault, fault]
    with pytest.warns(UserWarning, match=r"2\.tar: .*asked again in 0.0[12] s"):
        path = cache.fetch(*about(server, 2))
    assert path.read_bytes() == bytes([2]) * SIZE
    assert server.asked == ["2.tar"] * 3


@pytest.mark.filterwarnings("ignore:.*asked again")
@pytest.mark.parametrize(("fault", "says"), [("500", "500"), ("503", "503"), ("cut", "asked 6 times")])
def test_what_always_fails_is_told_and_leaves_nothing(server: Server, tmp_path: Path, fault: str, says: str) -> None:
    cache = FileCache(tmp_path / "cache")
    server.faults["2.tar"] = [fault] * 6
    with pytest.raises(UnreachableError, match=says):
        cache.fetch(*about(server, 2))
    assert files(cache) == []
    assert cache.fetch(*about(server, 2)).stat().st_size == SIZE  # the server came back


@pytest.mark.filterwarnings("ignore:.*asked again")
def test_a_wrong_file_is_the_fault_of_the_file(server: Server, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache")
    server.faults["2.tar"] = ["wrong"] * 6
    with pytest.raises(RemoteError, match="SHA-256 is not the manifest's") as caught:
        cache.fetch(*about(server, 2))
    assert not isinstance(caught.value, UnreachableError)
    assert server.asked == ["2.tar"] * 6 and files(cache) == []


def test_what_is_not_there_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache")
    for fault, says in (("404", "is not there"), ("403", "may not be read"), ("long", "more than the 40,000 bytes")):
        server.asked.clear()
        server.faults["2.tar"] = [fault]
        with pytest.raises(RemoteError, match=says) as caught:
            cache.fetch(*about(server, 2))
        assert not isinstance(caught.value, UnreachableError)
        assert server.asked == ["2.tar"]
        assert files(cache) == []


@pytest.mark.filterwarnings("ignore:.*asked again")
def test_no_server(tmp_path: Path) -> None:
    with serving(tmp_path) as gone:
        pass
    with pytest.raises(UnreachableError, match="asked 6 times"):
        read_small(f"{gone.url}/manifest.json", 100)


def test_the_folder_keeps_its_limit_and_what_was_used_last(server: Server, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", limit=3.5 * SIZE)
    for step, number in enumerate([0, 1, 2, 0, 3, 4, 0, 5]):
        path = cache.fetch(*about(server, number))
        os.utime(path, (step, step))  # the file system's clock may be too coarse for this test
        assert sum(file.stat().st_size for file in files(cache)) <= cache.limit
    assert server.asked == [f"{number}.tar" for number in (0, 1, 2, 3, 4, 5)]  # 0 was never the oldest
    kept = {about(server, number)[2] for number in (0, 4, 5)}
    assert {file.name for file in files(cache)} == kept


def test_a_file_that_can_never_fit(server: Server, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"40,000 bytes and the cache in .* may have 39,000: raise its limit"):
        FileCache(tmp_path / "cache", limit=39_000).fetch(*about(server, 1))
    assert server.asked == []
    with pytest.raises(ValueError, match="limit of 0"):
        FileCache(tmp_path / "cache", limit=0)


FETCH = """
import sys
from ivideogpt.data.file_cache import FileCache
print(FileCache(sys.argv[1]).fetch(sys.argv[2], int(sys.argv[3]), sys.argv[4]), flush=True)
"""


def fetching(cache: FileCache, url: str, size: int, sha256: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", FETCH, str(cache.folder.parent), url, str(size), sha256]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_share_a_download(server: Server, tmp_path: Path) -> None:
    cache, server.seconds = FileCache(tmp_path / "cache"), 1.0
    running = [fetching(cache, *about(server, 1)) for _ in range(3)]
    for process in running:
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    assert server.asked == ["1.tar"]


def test_processes_wait_for_room(server: Server, tmp_path: Path) -> None:
    cache, server.seconds = FileCache(tmp_path / "cache", limit=1.5 * SIZE), 0.5
    limited = FETCH.replace("FileCache(sys.argv[1])", f"FileCache(sys.argv[1], {1.5 * SIZE})")
    words = [sys.executable, "-c", limited, str(cache.folder.parent)]
    running = [
        subprocess.Popen([*words, *map(str, about(server, number))], stderr=subprocess.PIPE, text=True)
        for number in range(4)
    ]
    for process in running:
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    assert sorted(server.asked) == [f"{number}.tar" for number in range(4)]
    assert sum(file.stat().st_size for file in files(cache)) <= cache.limit


def test_a_kill_in_the_middle_of_a_download(server: Server, tmp_path: Path) -> None:
    cache, server.seconds = FileCache(tmp_path / "cache", limit=1.5 * SIZE), 30.0
    process = fetching(cache, *about(server, 1))
    while not list(cache.folder.glob("*.partial")):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.communicate()
    server.seconds = 0.0
    assert not cache.has(about(server, 1)[2])  # half a file is none
    assert cache.fetch(*about(server, 2)).stat().st_size == SIZE  # and keeps no room
    assert cache.fetch(*about(server, 1)).read_bytes() == bytes([1]) * SIZE
    assert [path.name for path in files(cache)] == [about(server, 1)[2]]


def test_a_full_disk(server: Server, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache")
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({SIZE // 2}, {SIZE // 2}))\n{FETCH}"
    words = [sys.executable, "-c", limited, str(cache.folder.parent), *map(str, about(server, 1))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "File too large" in done.stderr.splitlines()[-1]
    assert files(cache) == []


def test_urls() -> None:
    assert all(map(is_url, ("http://host/set", "https://host/set", "s3://bucket/set", "hf://datasets/me/set")))
    for text in (
        "pipe:cat x",
        "simplecache::http://host/set",
        "file:///set",
        "/set",
        "set",
        "ssh://host/set",
        "http:x",
    ):
        assert not is_url(text)
    with pytest.raises(RemoteError, match="no SHA-256"):
        FileCache().has("../../etc/passwd")
