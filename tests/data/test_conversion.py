"""Conversion: the same shards from any number of processes and after a kill; what is bad is named and left out."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from ivideogpt.data.conversion import encode_all
from ivideogpt.data.episode import Episode
from ivideogpt.data.packing import pack
from ivideogpt.data.reader import ShardSet, verify_set
from ivideogpt.data.shards import QUARANTINE

SHARD_BYTES = 30_000  # some three episodes


def write_episodes(folder: Path, count: int = 12) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        video = rng.integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)
        np.savez(folder / f"e{number:03d}.npz", video=video, action=rng.normal(size=(6, 2)), reward=np.arange(6.0))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files["manifest.json"])
    del manifest["command"]
    return files | {"manifest.json": json.dumps(manifest).encode()}


def test_any_number_of_processes(tmp_path: Path) -> None:
    source = write_episodes(tmp_path / "npz")
    pack(source, tmp_path / "one", shard_bytes=SHARD_BYTES, holdout=0.2)
    pack(source, tmp_path / "three", shard_bytes=SHARD_BYTES, holdout=0.2, workers=3)
    for part in ("train", "heldout"):
        assert content(tmp_path / "one" / part) == content(tmp_path / "three" / part)
    assert len(list((tmp_path / "one" / "train").glob("*.tar"))) > 2


SCRIPT = """
import sys, time
from ivideogpt.data import packing
from ivideogpt.data.packing import pack

def slowly(done, total):
    print(done, flush=True)
    time.sleep(0.2)

pack(sys.argv[1], sys.argv[2], shard_bytes=int(sys.argv[3]), holdout=0.2, progress=slowly)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed(tmp_path: Path, how: signal.Signals) -> None:
    source, out = write_episodes(tmp_path / "npz"), tmp_path / "out"
    words = [sys.executable, "-c", SCRIPT, str(source), str(out), str(SHARD_BYTES)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        while int(process.stdout.readline()) < 8:
            pass
        process.send_signal(how)
    assert not (out / "train" / "manifest.json").exists()
    assert not list(out.rglob("[!.]*.tar"))
    staged = list((out / "train").glob(".*.tar.partial"))
    assert staged
    report = pack(source, out, shard_bytes=SHARD_BYTES, holdout=0.2)
    assert 0 < report.resumed < 8
    assert report.episodes == 12
    pack(source, tmp_path / "whole", shard_bytes=SHARD_BYTES, holdout=0.2)
    for part in ("train", "heldout"):
        assert content(out / part) == content(tmp_path / "whole" / part)
        assert not list((out / part).glob(".*"))


def interrupted(source: Path, out: Path, after: int) -> None:
    def stop(done: int, total: int | None) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, out, shard_bytes=SHARD_BYTES, progress=stop)


def test_other_words_or_a_damaged_shard_begin_anew(tmp_path: Path) -> None:
    source, out = write_episodes(tmp_path / "npz"), tmp_path / "out"
    interrupted(source, out, 10)
    assert pack(source, tmp_path / "out", shard_bytes=SHARD_BYTES, resize=16).resumed == 0
    out = tmp_path / "again"
    interrupted(source, out, 10)
    shard = min(out.glob(".*.tar.partial"))
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    assert pack(source, out, shard_bytes=SHARD_BYTES).resumed == 0
    assert verify_set(out) == []


def test_killed_between_the_shards_and_the_manifest(tmp_path: Path) -> None:
    source, out = write_episodes(tmp_path / "npz"), tmp_path / "out"
    interrupted(source, out, 12)
    staged = sorted(out.glob(".*.tar.partial"))
    os.replace(staged[0], out / staged[0].name[1:].removesuffix(".partial"))
    assert pack(source, out, shard_bytes=SHARD_BYTES).resumed >= 9
    pack(source, tmp_path / "whole", shard_bytes=SHARD_BYTES)
    assert content(out) == content(tmp_path / "whole")


def test_a_source_that_lost_what_was_packed(tmp_path: Path) -> None:
    source, out = write_episodes(tmp_path / "npz"), tmp_path / "out"
    interrupted(source, out, 10)
    (source / "e001.npz").unlink()
    with pytest.raises(ValueError, match="has changed: 1 episodes packed before are not there now; use overwrite"):
        pack(source, out, shard_bytes=SHARD_BYTES)
    assert pack(source, out, shard_bytes=SHARD_BYTES, overwrite=True).episodes == 11


def test_quarantine(tmp_path: Path) -> None:
    source, out = write_episodes(tmp_path / "npz", 4), tmp_path / "out"
    (source / "e001.npz").write_bytes(b"no archive")
    np.savez(source / "e002.npz", video=np.zeros((3, 8, 8, 3), np.uint8), action=np.array([{}], dtype=object))
    with pytest.warns(UserWarning, match="skipped"):
        report = pack(source, out, policy="skip", workers=2)
    assert [name for name, _ in report.skipped] == ["e001", "e002"]
    lines = [json.loads(line) for line in (out / QUARANTINE).read_text().splitlines()]
    assert [line["key"] for line in lines] == ["e001", "e002"]
    assert "e001.npz" in lines[0]["reason"]
    assert ShardSet(out).manifest["quarantine"] == {"episodes": 2, "file": QUARANTINE}
    for path in source.glob("e00[12].npz"):
        path.unlink()
    pack(source, out, overwrite=True)
    assert not (out / QUARANTINE).exists()


def test_a_failed_overwrite_leaves_the_old_quarantine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_episodes(tmp_path / "npz", 3), tmp_path / "out"
    (source / "e001.npz").write_bytes(b"no archive")
    with pytest.warns(UserWarning, match="skipped"):
        pack(source, out, policy="skip")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (source / "e001.npz").unlink()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ivideogpt.data.shards.write_json", fail)
    with pytest.raises(OSError, match="nothing was changed"):
        pack(source, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_somebody_elses_tar_is_refused_in_an_unfinished_folder(tmp_path: Path) -> None:
    source, out = write_episodes(tmp_path / "npz"), tmp_path / "out"
    interrupted(source, out, 10)
    (out / "mine.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds tar files"):
        pack(source, out, shard_bytes=SHARD_BYTES)
    assert (out / "mine.tar").read_bytes() == b"precious"


def test_nothing_but_bad_episodes(tmp_path: Path) -> None:
    source = tmp_path / "npz"
    source.mkdir()
    (source / "a.npz").write_bytes(b"x")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="all 1 episodes of .* are bad"):
        pack(source, tmp_path / "out", policy="skip")
    assert not (tmp_path / "out").exists()


def read(number: int) -> Episode:
    """Episode 3 takes the process down with it, as a decoder that crashes does."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return Episode(np.full((2, 8, 8, 3), number, np.uint8))


def test_a_process_that_dies_costs_one_episode() -> None:
    jobs = [(f"e{number}", partial(read, number)) for number in range(9)]
    found = list(encode_all(jobs, None, 2))
    assert [key for key, _ in found] == [f"e{number}" for number in range(9)]
    errors = {key: str(result) for key, result in found if isinstance(result, Exception)}
    assert list(errors) == ["e3"]
    assert "took its process down" in errors["e3"]


def test_a_full_disk_keeps_full_shards(tmp_path: Path) -> None:
    source, out = write_episodes(tmp_path / "npz"), tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(done: int, total: int | None) -> None:
        if done == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))

    try:
        with pytest.raises(OSError, match="could not write"):
            pack(source, out, shard_bytes=SHARD_BYTES, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert pack(source, out, shard_bytes=SHARD_BYTES).resumed >= 6
    assert verify_set(out) == []
