"""What goes wrong in a conversion: bad episodes are named and counted, and what was finished is kept."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivideogpt.data.conversion.listing import Piece
from ivideogpt.data.conversion.local import run_here
from ivideogpt.data.conversion.plan import Settings, Unit
from ivideogpt.data.conversion.staging import STAGING
from ivideogpt.data.conversion.unit import Row
from ivideogpt.data.episode import Episode
from ivideogpt.data.manifest import MANIFEST
from ivideogpt.data.packing import QUARANTINE, pack
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.verification import verify_set

FIXTURES = Path(__file__).parent / "fixtures"
SHARD_BYTES = 30_000


def write_episodes(folder: Path, count: int = 12) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        video = rng.integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)
        np.savez(folder / f"e{number:03d}.npz", video=video, action=rng.normal(size=(6, 2)))
    return folder


def lines(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / QUARANTINE).read_text().splitlines()]


def frames(count: int = 6) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)


def npz_faults(folder: Path) -> dict[str, str]:
    """Files that make no episode, and what their reasons have to say."""
    (folder / "cut.npz").write_bytes((folder / "e000.npz").read_bytes()[:2000])
    np.savez(folder / "nan.npz", video=frames(), action=np.full((6, 2), np.nan))
    np.savez(folder / "long.npz", video=frames(), action=np.zeros((9, 2)))
    np.savez(folder / "pickle.npz", video=frames(), action=np.array([os.getcwd] * 6, dtype=object))
    np.savez(folder / "nothing.npz", x=np.zeros(3))
    return {
        "cut": "not a whole .npz file", "long": "9 rows for 6 frames", "nan": "every value must be finite",
        "nothing": "none of observation", "pickle": "Object arrays cannot be loaded",
    }  # fmt: skip


def test_quarantine(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Callable[..., int]) -> None:
    source, out = write_episodes(tmp_path / "npz"), tmp_path / "out"
    expected = npz_faults(source)
    assert run("pack", source, "--out", out, "--workers", "2") == 0
    found = {line["key"]: line for line in lines(out)}
    assert found.keys() == expected.keys()
    for key, reason in expected.items():
        assert reason in found[key]["reason"]
        assert found[key]["kind"] == "ValueError"
    shards = ShardSet(out)
    assert len(shards) == 12
    assert shards.manifest["quarantine"] == {"episodes": 5, "file": QUARANTINE}
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith("packed 12 episodes (72 frames), 5 bad ones in ")
    assert "5 bad episodes left out" in captured.err and "pickle" in captured.err
    assert run("pack", source, "--out", out, "--workers", "2") == 0
    assert capsys.readouterr().out.startswith(f"nothing to do: {out} holds these 12 episodes")
    for key in expected:
        (source / f"{key}.npz").unlink()
    pack(source, out, overwrite=True)
    assert not (out / QUARANTINE).exists()


def test_strict_and_too_many(tmp_path: Path, run: Callable[..., int]) -> None:
    source, out = write_episodes(tmp_path / "npz", 4), tmp_path / "out"
    npz_faults(source)
    with pytest.raises(ValueError, match="cut.npz"):
        run("pack", source, "--out", out, "--strict", "--workers", "2")
    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match="5 of 9 episodes of .* more than --max-bad 0.5 allows; the first, cut"):
        run("pack", source, "--out", out, "--workers", "1")
    assert not (out / "manifest.json").exists()
    assert run("pack", source, "--out", out, "--workers", "1", "--max-bad", "0.6") == 0
    assert len(ShardSet(out)) == 4


def test_nothing_but_bad_episodes(tmp_path: Path) -> None:
    source = tmp_path / "npz"
    source.mkdir()
    (source / "a.npz").write_bytes(b"x")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="all 1 episodes of .* are bad"):
        pack(source, tmp_path / "out", policy="skip", max_bad=1.0)
    assert not (tmp_path / "out").exists()


def test_a_failed_overwrite_leaves_the_old_quarantine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_episodes(tmp_path / "npz", 3), tmp_path / "out"
    (source / "e001.npz").write_bytes(b"no archive")
    with pytest.warns(UserWarning, match="skipped"):
        pack(source, out, policy="skip")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (source / "e001.npz").unlink()
    replace = os.replace

    def fail(path: str | Path, target: str | Path) -> None:
        if Path(target) == out / MANIFEST:
            raise OSError(28, "No space left on device")
        replace(path, target)

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="what was finished is kept"):
        pack(source, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    monkeypatch.undo()
    assert pack(source, out).resumed == 2  # the old command's overwrite still counts
    assert not (out / QUARANTINE).exists()


def test_somebody_elses_tar_is_refused_in_an_unfinished_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_episodes(tmp_path / "npz"), tmp_path / "out"
    monkeypatch.setattr("ivideogpt.data.packing._refuse_mostly_bad", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack(source, out, shard_bytes=SHARD_BYTES)
    monkeypatch.undo()
    (out / "mine.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds tar files"):
        pack(source, out, shard_bytes=SHARD_BYTES)
    assert (out / "mine.tar").read_bytes() == b"precious"
    (out / "mine.tar").unlink()
    assert pack(source, out, shard_bytes=SHARD_BYTES).resumed == 12


@pytest.mark.parametrize("holdout", [[], ["--holdout-every", "2"]])
def test_damaged_tfrecords(tmp_path: Path, holdout: list[str], run: Callable[..., int]) -> None:
    """Files of tensorflow-datasets: a byte that its checksum finds, and an end that is missing."""
    source, out = tmp_path / "rlds", tmp_path / "out"
    shutil.copytree(FIXTURES / "rlds_robot", source)
    whole = tmp_path / "whole"
    assert run("pack", source, "--out", whole, "--workers", "1") == 0
    first, second = sorted(source.rglob("*train.tfrecord*"))
    data = bytearray(first.read_bytes())
    data[len(data) // 3] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-30])
    assert run("pack", source, "--out", out, "--workers", "2", *holdout) == 0
    parts = [out / "train", out / "heldout"] if holdout else [out]
    reasons = " ".join(line["reason"] for part in parts if (part / QUARANTINE).is_file() for line in lines(part))
    assert "checksum" in reasons and "cut off" in reasons
    kept = [ShardSet(part) for part in parts]
    keys = [shards.key(index) for shards in kept for index in range(len(shards))]
    complete = ShardSet(whole)
    assert 0 < len(keys) < len(complete)
    assert len(set(keys)) == len(keys)
    assert set(keys) < {complete.key(index) for index in range(len(complete))}


def test_missing_camera_and_wrong_features(tmp_path: Path, run: Callable[..., int]) -> None:
    with pytest.raises(ValueError, match=r"no camera 'hand'; those there are \["):
        run("pack", FIXTURES / "rlds_robot", "--out", tmp_path / "out", "--camera", "hand")
    source = tmp_path / "rlds"
    shutil.copytree(FIXTURES / "rlds_robot", source)
    (features,) = source.rglob("features.json")
    features.write_text('{"pythonClassName": 3}')
    with pytest.raises(ValueError, match="features.json"):
        run("pack", source, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_videos(tmp_path: Path, run: Callable[..., int]) -> None:
    """Written by ffmpeg's libraries: one that is cut off, one with too many actions beside it."""
    av: Any = pytest.importorskip("av")
    source, out = tmp_path / "videos", tmp_path / "out"
    source.mkdir()
    for name in ("cut", "good", "long"):
        with av.open(str(source / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=5)
            stream.height = stream.width = 48
            stream.pix_fmt = "yuv420p"
            for frame in np.random.default_rng(2).integers(0, 256, (12, 48, 48, 3), dtype=np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    path = source / "cut.mp4"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    np.save(source / "good.npy", np.zeros((12, 2)))
    np.save(source / "long.npy", np.zeros((20, 2)))
    assert run("pack", source, "--out", out, "--workers", "2", "--max-bad", "0.7") == 0
    reasons = {line["key"]: line["reason"] for line in lines(out)}
    assert "cut.mp4" in reasons["cut"]
    assert "20 rows for 12 frames" in reasons["long"]
    assert len(ShardSet(out)) == 1


def changing(path: Path) -> Episode:
    path.write_bytes(path.read_bytes() + b"x")
    return Episode(np.zeros((2, 8, 8, 3), np.uint8))


def steady(path: Path) -> Episode:
    return Episode(np.zeros((2, 8, 8, 3), np.uint8))


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    log, other = tmp_path / "log", tmp_path / "other"
    log.touch()
    other.touch()
    jobs = (("a", partial(steady, other)), ("b", partial(changing, log)), ("c", partial(steady, log)))
    unit = Unit(0, 0, ((Piece(jobs, 3, 1), None),), 3)
    ((_, row),) = run_here([unit], tmp_path, Settings(), lambda done: None)
    assert isinstance(row, Row)
    assert row.episodes == 1
    assert [line["key"] for line in row.quarantine] == ["b", "c"]
    assert all("log changed while it was read" in line["reason"] for line in row.quarantine)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(small_disk: Path, tmp_path: Path, workers: int) -> None:
    source, out = write_episodes(tmp_path / "npz", 30), small_disk / "out"
    with pytest.raises(OSError, match=r"No space left on device.*what was finished is kept") as caught:
        pack(source, out, shard_bytes=SHARD_BYTES, workers=workers)
    assert caught.value.errno == 28
    assert not list(out.glob("*.tar")) and not (out / "manifest.json").exists()
    assert list((out / STAGING).glob("unit-*.json"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    report = pack(source, out, shard_bytes=SHARD_BYTES, workers=workers)
    assert report.resumed and report.episodes == 30
    assert verify_set(out) == []


def test_a_full_disk_for_those_who_may_not_mount_one(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("part", ["0/3", "4/3", "x"])
def test_parts_that_are_none(
    tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str], run: Callable[..., int]
) -> None:
    with pytest.raises(SystemExit):
        run("pack", tmp_path, "--out", tmp_path / "out", "--part", part)
    assert "is no part such as 1/8 to 8/8" in capsys.readouterr().err
