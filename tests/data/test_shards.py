"""Writing shard sets: what is in them, and that a fault in the middle leaves the old set whole."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from ivideogpt.data.codec import decode_episode
from ivideogpt.data.episode import Episode
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.shards import MANIFEST, ShardSetWriter, encoded
from ivideogpt.data.verification import verify_set


def files(folder: Path) -> dict[str, str]:
    """Every file under a folder, hidden ones too, and its hash."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_manifest(make_set: Callable[..., Path], make_episode: Callable[..., Episode]) -> None:
    folder = make_set(episodes=8, per_shard=3)
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["schema_version"] == 2
    assert manifest["counts"] == {"shards": 3, "episodes": 8, "frames": sum(range(12, 20))}
    assert manifest["command"] == "made by a test"
    assert manifest["resolutions"] == [[16, 16]]
    assert manifest["licences"] == ["CC0-1.0"]
    assert manifest["sources"] == {
        "synthetic": {
            "episodes": 8, "frames": sum(range(12, 20)), "licence": "CC0-1.0", "statistics": manifest["statistics"]
        },
    }  # fmt: skip
    shards = ShardSet(folder)
    assert "ivideogpt" in manifest["converter"]
    for number, shard in enumerate(manifest["shards"]):
        path = folder / shard["name"]
        assert shard["size"] == path.stat().st_size
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        with tarfile.open(path) as tar:
            members = {member.name: (member.offset_data, member.size, member.mtime) for member in tar}
        rows = [row for row in map(shards.index.row, range(8)) if row["shard"] == number]
        assert members == {row["key"] + ".safetensors": (row["offset"], row["size"], 0) for row in rows}
        assert shard["episodes"] == len(rows)
    episodes = [make_episode(12 + i, seed=i) for i in range(8)]
    actions = np.concatenate([episode.actions[:-1] for episode in episodes if episode.actions is not None])
    statistics = manifest["statistics"]["actions"]
    assert statistics["count"] == len(actions)
    np.testing.assert_allclose(statistics["mean"], actions.mean(0), atol=1e-6)
    np.testing.assert_allclose(statistics["std"], actions.std(0), atol=1e-6)
    np.testing.assert_allclose(statistics["max"], actions.max(0))
    tars = ["episodes-000000.tar", "episodes-000001.tar", "episodes-000002.tar"]
    assert sorted(files(folder)) == [*tars, manifest["index"]["name"], MANIFEST]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # WebDataset leaves its files open
def test_plain_webdataset_reads_the_shards(make_set: Callable[..., Path], make_episode: Callable[..., Episode]) -> None:
    folder = make_set(episodes=5, per_shard=2)
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"set-{i:03d}" for i in range(5)]
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(decode_episode(sample["safetensors"]).video, make_episode(12 + i, seed=i).video)
    gc.collect()  # its files are closed here, not in the next test


def test_equal_input_gives_equal_files(make_set: Callable[..., Path], tmp_path: Path) -> None:
    first = files(make_set("set"))
    (tmp_path / "set").rename(tmp_path / "moved")
    assert files(make_set("set")) == first


def test_a_set_is_not_overwritten_by_accident(make_set: Callable[..., Path]) -> None:
    folder = make_set()
    with pytest.raises(ValueError, match="holds a shard set already"):
        ShardSetWriter(folder)


def test_tars_of_others_stay(tmp_path: Path, make_episode: Callable[..., Episode]) -> None:
    (tmp_path / "episodes-000000.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds tar files"):
        ShardSetWriter(tmp_path)
    assert (tmp_path / "episodes-000000.tar").read_bytes() == b"mine"


def test_overwriting_deletes_nothing_outside(
    make_set: Callable[..., Path], make_episode: Callable[..., Episode]
) -> None:
    """A hostile manifest may list anything."""
    folder = make_set()
    victim = folder.parent / "victim.tar"
    victim.write_bytes(b"mine")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][0]["name"] = "../victim.tar"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with ShardSetWriter(folder, overwrite=True) as writer:
        writer.write("new", make_episode())
    assert victim.exists()
    assert verify_set(folder) == []


def test_what_a_killed_writer_left_unlisted_goes(
    make_set: Callable[..., Path], make_episode: Callable[..., Episode]
) -> None:
    """Killed between the renaming of its shards and the manifest's."""
    folder = make_set(episodes=2, per_shard=2)
    for name in ("episodes-000001.tar", "episodes-0123abcd-000000.tar", "other-000000.tar"):
        (folder / name).write_bytes(b"x")
    assert verify_set(folder) == []
    with ShardSetWriter(folder, overwrite=True) as writer:
        writer.write("new", make_episode())
    assert sorted(files(folder))[2:] == [MANIFEST, "other-000000.tar"]


def test_overwriting_replaces_the_set(make_set: Callable[..., Path], make_episode: Callable[..., Episode]) -> None:
    folder = make_set(episodes=4, per_shard=2)
    for seed in (50, 60, 60):
        with ShardSetWriter(folder, overwrite=True) as writer:
            writer.write("new", make_episode(9, seed=seed))
        assert verify_set(folder) == []
        shards = ShardSet(folder)
        assert [shards.key(i) for i in range(len(shards))] == ["new"]
        assert len(files(folder)) == 3


@pytest.mark.parametrize("key", ["", "a/b", "../a", "a.b", "-a", "a" * 90, "ä"])
def test_keys_that_are_no_file_names(tmp_path: Path, make_episode: Callable[..., Episode], key: str) -> None:
    with pytest.raises(ValueError, match="may hold letters"), ShardSetWriter(tmp_path / "out") as writer:
        writer.write(key, make_episode())
    assert not (tmp_path / "out").exists()


def write_all(writer: ShardSetWriter, keys: list[str], episode: Episode, then: BaseException | None = None) -> None:
    with writer:
        for key in keys:
            writer.write(key, episode)
        if then is not None:
            raise then


def test_two_episodes_with_one_key(tmp_path: Path, make_episode: Callable[..., Episode]) -> None:
    with pytest.raises(ValueError, match="two episodes have the key 'a'"):
        write_all(ShardSetWriter(tmp_path / "out"), ["a", "a"], make_episode())


def test_an_empty_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no episode was written"), ShardSetWriter(tmp_path / "out"):
        pass
    assert not (tmp_path / "out").exists()


def test_an_error_in_the_middle_leaves_the_old_set(
    make_set: Callable[..., Path], make_episode: Callable[..., Episode]
) -> None:
    folder = make_set()
    before = files(folder)
    writer = ShardSetWriter(folder, overwrite=True, shard_episodes=2)
    with pytest.raises(KeyboardInterrupt):
        write_all(writer, [f"new-{i}" for i in range(5)], make_episode(), KeyboardInterrupt())
    assert files(folder) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(writer: ShardSetWriter) -> None:
    """Writes incompressible episodes of 100 KB each."""
    rng = np.random.default_rng(0)
    with writer:
        for i in range(30):
            writer.write(f"big-{i}", Episode(rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)))


def test_full_disk(small_disk: Path, make_episode: Callable[..., Episode]) -> None:
    folder = small_disk / "set"
    with ShardSetWriter(folder) as writer:
        writer.write("old", make_episode())
    before = files(folder)
    with pytest.raises(OSError, match="could not write the shard set .*No space left.* nothing was changed"):
        fill(ShardSetWriter(folder, overwrite=True, shard_episodes=1))
    assert files(folder) == before
    assert verify_set(folder) == []
    with pytest.raises(OSError, match="No space left"):
        fill(ShardSetWriter(small_disk / "fresh"))
    assert not (small_disk / "fresh").exists()


def test_file_size_limit(tmp_path: Path, make_set: Callable[..., Path]) -> None:
    """As a full disk, for users who may not mount one."""
    folder = make_set()
    before = files(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 * 1024, limits[1]))
    try:
        with pytest.raises(OSError, match="could not write the shard set .*File too large.* nothing was changed"):
            fill(ShardSetWriter(folder, overwrite=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(folder) == before


WRITE_FOREVER = """
import itertools, sys
import numpy as np
from ivideogpt.data.episode import Episode
from ivideogpt.data.shards import ShardSetWriter
with ShardSetWriter(sys.argv[1], overwrite=True, shard_episodes=3) as writer:
    for i in itertools.count():
        writer.write(f"new-{i}", Episode(np.full((8, 32, 32, 3), i % 256, np.uint8)))
        print(i, flush=True)
"""


def test_kill_in_the_middle(make_set: Callable[..., Path], make_episode: Callable[..., Episode]) -> None:
    folder = make_set()
    before = files(folder)
    with subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while process.stdout.readline() != b"10\n":  # three whole shards and one begun
            time.sleep(0)
        os.kill(process.pid, signal.SIGKILL)
    after = files(folder)
    assert {name: digest for name, digest in after.items() if not name.startswith(".")} == before
    assert verify_set(folder) == []
    assert len(after) > len(before)  # what it had begun, hidden, lies there ...
    with ShardSetWriter(folder, overwrite=True) as writer:
        writer.write("new", make_episode())
    assert sorted(name for name in files(folder) if name.startswith(".")) == []  # ... until the next writer
    assert verify_set(folder) == []


def test_encoded_elsewhere(tmp_path: Path, make_episode: Callable[..., Episode]) -> None:
    episode = make_episode()
    with ShardSetWriter(tmp_path / "a") as writer:
        writer.write("one", episode)
    with ShardSetWriter(tmp_path / "b") as writer:
        writer.write_encoded("one", *encoded(episode))
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_sets_without_actions_or_with_mixed_widths(tmp_path: Path, make_episode: Callable[..., Episode]) -> None:
    for name, widths in (("none", [None, None]), ("mixed", [2, 3])):
        with ShardSetWriter(tmp_path / name) as writer:
            for i, width in enumerate(widths):
                writer.write(f"e{i}", make_episode(action_dim=width))
        manifest = json.loads((tmp_path / name / MANIFEST).read_text())
        assert manifest["statistics"]["actions"] is None
        assert manifest["statistics"]["rewards"]["count"] == 38
        assert manifest["action_dims"] == ([0] if widths[0] is None else [2, 3])
