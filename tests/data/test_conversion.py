"""Conversion: the same shards from any number of processes or parts and after a kill; nothing lost or doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ivideogpt.data.conversion.listing import Piece
from ivideogpt.data.conversion.local import run_processes
from ivideogpt.data.conversion.plan import Settings, Unit
from ivideogpt.data.conversion.staging import STAGING
from ivideogpt.data.conversion.unit import CRASHED, Row
from ivideogpt.data.episode import Episode
from ivideogpt.data.packing import pack
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.verification import verify_set

SHARD_BYTES = 30_000  # some three episodes
FIXTURES = Path(__file__).parent / "fixtures"


def write_episodes(folder: Path, count: int = 12) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        video = rng.integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)
        np.savez(folder / f"e{number:03d}.npz", video=video, action=rng.normal(size=(6, 2)), reward=np.arange(6.0))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_episodes(tmp_path_factory.mktemp("source") / "npz")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of the source without being disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    report = pack(source, out, shard_bytes=SHARD_BYTES, holdout=0.2)
    assert (report.episodes, report.resumed, report.missing) == (12, 0, 0)
    assert len(list((out / "train").glob("*.tar"))) > 2
    assert verify_set(out / "train") == verify_set(out / "heldout") == []
    return content(out)


def test_any_number_of_processes(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    pack(source, tmp_path / "out", shard_bytes=SHARD_BYTES, holdout=0.2, workers=3, progress=lambda *x: seen.append(x))
    assert content(tmp_path / "out") == whole
    assert seen[-1] == (12, 12) or max(seen) == (12, 12)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_parts(source: Path, whole: dict[str, bytes], tmp_path: Path, order: tuple[int, ...]) -> None:
    out = tmp_path / "out"
    for number in order:
        assert not list(out.rglob("manifest.json"))
        report = pack(source, out, shard_bytes=SHARD_BYTES, holdout=0.2, part=(number, 3))
        assert (report.missing == 0) == (number == order[-1])
    assert content(out) == whole
    assert pack(source, out, shard_bytes=SHARD_BYTES, holdout=0.2, part=(1, 3)).found


def test_a_run_without_a_part_finishes_what_is_missing(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = pack(source, out, shard_bytes=SHARD_BYTES, holdout=0.2, part=(2, 3))
    report = pack(source, out, shard_bytes=SHARD_BYTES, holdout=0.2)
    assert 0 < report.resumed == first.episodes < report.episodes == 12
    assert content(out) == whole


PACK = """
import sys, time
from ivideogpt.data.packing import pack

def slowly(done, total):
    print(done, flush=True)
    time.sleep(0.1)

if __name__ == "__main__":
    part = tuple(map(int, sys.argv[5:])) or None
    pack(sys.argv[1], sys.argv[2], shard_bytes=int(sys.argv[3]), holdout=0.2, progress=slowly, workers=int(sys.argv[4]),
         part=part)
"""


def started(source: Path, out: Path, workers: int, *part: int) -> subprocess.Popen[str]:
    script = out.parent / "convert.py"
    script.write_text(PACK)
    words = [sys.executable, str(script), str(source), str(out), str(SHARD_BYTES), str(workers), *map(str, part)]
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


@pytest.mark.parametrize(("how", "workers"), [(signal.SIGKILL, 1), (signal.SIGINT, 1), (signal.SIGKILL, 2)])
def test_killed_and_resumed(
    source: Path, whole: dict[str, bytes], tmp_path: Path, how: signal.Signals, workers: int
) -> None:
    out = tmp_path / "out"
    with started(source, out, workers) as process:
        assert process.stdout is not None
        while not list((out / STAGING).glob("unit-*.json")) or int(process.stdout.readline()) < 5:
            pass
        process.send_signal(how)
    assert not list(out.rglob("manifest.json"))
    assert {path.parent.name for path in out.rglob("*.tar")} <= {STAGING}
    report = pack(source, out, shard_bytes=SHARD_BYTES, holdout=0.2)
    assert report.resumed > 0
    assert content(out) == whole


def test_workers_end_with_a_killed_parent(source: Path, tmp_path: Path) -> None:
    with started(source, tmp_path / "out", 2) as process:
        assert process.stdout is not None
        process.stdout.readline()
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        process.kill()
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


@pytest.mark.slow
def test_killed_while_the_sets_are_made(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """A kill after every single renaming of a shard or a manifest."""
    script = tmp_path / "commit.py"
    script.write_text(
        "import os, sys\nfrom ivideogpt.data.packing import pack\nmove, left = os.replace, [int(sys.argv[4])]\n"
        "def replace(a, b):\n    move(a, b)\n    if '.staging' not in str(b):\n        left[0] -= 1\n"
        "        if left[0] == 0:\n            os.kill(os.getpid(), 9)\n"
        "os.replace = replace\npack(sys.argv[1], sys.argv[2], shard_bytes=int(sys.argv[3]), holdout=0.2)\n"
    )
    renamed = len(whole)  # shards and manifests
    for count in range(1, renamed + 1):
        out = tmp_path / f"out{count}"
        words = [sys.executable, str(script), str(source), str(out), str(SHARD_BYTES), str(count)]
        assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
        pack(source, out, shard_bytes=SHARD_BYTES, holdout=0.2)
        assert content(out) == whole, count


def test_the_same_again_does_nothing(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(source, out, shard_bytes=SHARD_BYTES, holdout=0.2)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    report = pack(source, out, shard_bytes=SHARD_BYTES, holdout=0.2)
    assert (report.found, report.episodes, report.frames) == (True, 12, 72)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ValueError, match="holds a shard set already"):
        pack(source, out, shard_bytes=SHARD_BYTES, holdout=0.2, resize=16)
    assert not pack(source, out, shard_bytes=SHARD_BYTES, holdout=0.2, overwrite=True).found
    assert [len(ShardSet(out / part)) for part in ("train", "heldout")] == [10, 2]
    assert verify_set(out / "train") == []


def half(source: Path, out: Path) -> None:
    assert pack(source, out, shard_bytes=SHARD_BYTES, part=(1, 2)).missing


def test_what_is_staged_differs(source: Path, tmp_path: Path) -> None:
    mine, out = tmp_path / "npz", tmp_path / "out"
    write_episodes(mine)
    half(mine, out)
    with pytest.raises(ValueError, match=r"unfinished conversion: resize was None, now 16; .*--overwrite"):
        pack(mine, out, shard_bytes=SHARD_BYTES, resize=16)
    os.utime(mine / "e003.npz", (1, 1))
    with pytest.raises(ValueError, match="its files were changed"):
        pack(mine, out, shard_bytes=SHARD_BYTES)
    (mine / "e001.npz").unlink()
    with pytest.raises(ValueError, match="episodes was 12, now 11"):
        pack(mine, out, shard_bytes=SHARD_BYTES)
    report = pack(mine, out, shard_bytes=SHARD_BYTES, overwrite=True)
    assert (report.episodes, report.resumed) == (11, 0)
    assert verify_set(out) == []


def test_a_damaged_staged_shard_is_made_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    half(source, out)
    shard = min((out / STAGING).glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-100])
    pack(source, out, shard_bytes=SHARD_BYTES)
    assert verify_set(out) == []
    assert len(ShardSet(out)) == 12


def test_two_at_a_time(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(source, out, 1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ValueError, match="another process is converting into"):
            pack(source, out, shard_bytes=SHARD_BYTES, holdout=0.2)
        process.kill()
    (tmp_path / "parts").mkdir()
    out = tmp_path / "parts" / "out"
    processes = [started(source, out, 1, number, 2) for number in (1, 2)]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert content(out) == whole


def read(number: int, marks: str) -> Episode:
    """Episode 3 always takes its process down, as a decoder that crashes does; episode 5 only once."""
    mark = Path(marks) / str(number)
    if number == 3 or (number == 5 and not mark.exists()):
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Episode(np.full((2, 8, 8, 3), number, np.uint8))


def test_a_process_that_dies_costs_one_episode(tmp_path: Path) -> None:
    def unit(number: int, *episodes: int) -> Unit:
        jobs = tuple((f"e{episode}", partial(read, episode, str(tmp_path))) for episode in episodes)
        return Unit(number, 0, ((Piece(jobs, len(jobs), 1), None),), len(jobs))

    units = [unit(0, 0, 1, 2, 3), unit(1, 4, 5, 6), unit(2, 7, 8)]
    found = {done.number: row for done, row in run_processes(units, tmp_path, Settings(), lambda done: None, 2)}
    rows = [found[number] for number in range(3)]
    assert rows[1:] == [Row(3, 6, []), Row(2, 4, [])]
    assert rows[0] == Row(3, 6, [{"key": "e3", "reason": CRASHED, "kind": "ChildProcessError"}])
    assert not list(tmp_path.glob(".*.partial"))


def test_cameras_of_a_recording_stay_together(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = pack(FIXTURES / "bair", out, cameras=["all"], holdout=0.5)
    sides = []
    for folder in report.folders:
        shards = ShardSet(folder)
        recordings: dict[str, set[str]] = {}
        for index in range(len(shards)):
            episode = shards.episode(index)
            assert episode is not None
            recordings.setdefault(episode.metadata["recording"], set()).add(episode.camera)
        assert all(cameras == {"image_aux1", "image_main"} for cameras in recordings.values())
        sides.append(set(recordings))
    assert sides[0] and sides[1] and not sides[0] & sides[1]
    again = pack(out / "train", tmp_path / "alone", workers=2)  # the embedded recording of a set is known to it
    assert again.episodes == 2 * len(sides[0])


def test_every_nth_is_held_out(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "out", holdout_every=5)
    heldout = ShardSet(tmp_path / "out" / "heldout")
    assert [heldout.key(index) for index in range(len(heldout))] == ["e004", "e009"]
    pack(source, tmp_path / "few", holdout_every=100)
    assert len(ShardSet(tmp_path / "few" / "heldout")) == 1
