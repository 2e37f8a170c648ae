"""Reading shard sets: random access, and every kind of damage planted for real."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivideogpt.data.episode import Episode
from ivideogpt.data.file_cache import is_url
from ivideogpt.data.reader import ShardError, ShardSet, refuse_commands, resolve_source
from ivideogpt.data.shards import MANIFEST
from ivideogpt.data.verification import verify_set


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def member_of(folder: Path, index: int) -> tuple[Path, int, int]:
    """File, offset and size of an episode's record."""
    return ShardSet(folder).place(index)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def read_all(shards: ShardSet) -> list[str]:
    """Decodes every episode; the keys of the good ones."""
    return [shards.key(i) for i in range(len(shards)) if shards.episode(i) is not None]


def test_random_access(make_set: Callable[..., Path], make_episode: Callable[..., Episode]) -> None:
    shards = ShardSet(make_set(episodes=8, per_shard=3))
    for i in (7, 0, 4):
        episode = shards.episode(i)
        assert episode is not None
        np.testing.assert_array_equal(episode.video, make_episode(12 + i, seed=i).video)
        record = shards.record(i)
        assert record is not None
        np.testing.assert_array_equal(record.frames([11, 3]), episode.video[[11, 3]])
    assert shards.skipped == {}


def test_by_manifest_and_in_another_process(make_set: Callable[..., Path]) -> None:
    folder = make_set()
    shards = ShardSet(folder / MANIFEST)
    assert len(read_all(shards)) == 8
    assert len(read_all(pickle.loads(pickle.dumps(shards)))) == 8  # noqa: S301 - what a loading process is sent


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_embedded(split: str) -> None:
    shards = ShardSet(f"embedded:{split}")
    assert verify_set(f"embedded:{split}") == []
    assert len(shards.manifest["sources"]) >= 2
    assert shards.manifest["command"].startswith("ivideogpt data collect metaworld --task")
    assert shards.manifest["resolutions"] == [[64, 64]]
    assert shards.manifest["extra"]["fidelity"] == "fast"
    noise = {int(shards.key(i).split("-n")[1][:3]) for i in range(len(shards))}
    assert 0 in noise
    assert len(noise) > 1


def test_embedded_is_small_and_the_splits_share_nothing() -> None:
    train, heldout = ShardSet("embedded"), ShardSet("embedded:heldout")
    assert sum(path.stat().st_size for path in train.folder.parent.rglob("*") if path.is_file()) <= 4_000_000
    layouts = [{tuple(s.episode(i).metadata["layout"]) for i in range(len(s))} for s in (train, heldout)]  # type: ignore[union-attr]
    assert not layouts[0] & layouts[1]
    assert not {train.key(i) for i in range(len(train))} & {heldout.key(i) for i in range(len(heldout))}
    with pytest.raises(ShardError, match="no embedded set 'embedded:test'"):
        ShardSet("embedded:test")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="there is no folder"):
        ShardSet(tmp_path / "none")
    with pytest.raises(ShardError, match=f"{tmp_path} is empty"):
        ShardSet(tmp_path)
    (tmp_path / "episodes-000000.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"has no manifest.json"):
        ShardSet(tmp_path)


@pytest.mark.parametrize(
    "url", ["pipe:cat /etc/passwd", " PIPE:id", "s3://bucket/x", "gs://b/x", "http://host/x.tar", "sftp://h/x"]
)
def test_commands_are_refused(url: str) -> None:
    opening = () if is_url(url) else (ShardSet,)  # what fsspec reads runs none
    for attempt in (resolve_source, refuse_commands, *opening):
        with pytest.raises(ShardError, match="runs a command"):
            attempt(url)
    refuse_commands(url, allow=[url])
    with pytest.raises(ShardError, match="runs a command"):
        refuse_commands(url, allow=[url + "x", "pipe:"])


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a/b.tar", "pipe:x.tar", ".hidden.tar", "x.zip", "x.tar\n"])
def test_shard_names_that_leave_the_folder(make_set: Callable[..., Path], name: str) -> None:
    folder = make_set()
    edit_manifest(folder, lambda manifest: manifest["shards"][0].update(name=name))
    with pytest.raises(ShardError, match="is not a plain file name"):
        ShardSet(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["counts"].update(episodes=9), "disagrees with itself: counts .*'episodes': 9"),
        (lambda m: m["counts"].update(frames=1), "disagrees with itself"),
        (lambda m: m["shards"].pop(), "disagrees with itself"),
        (lambda m: m.update(schema_version=3), "version 3, this package reads ivideogpt-shards versions 1 to 2"),
        (lambda m: m.update(format="other"), "other version 2, this package reads"),
        (lambda m: m["shards"][0].update(episodes=2), "disagrees with itself"),
        (lambda m: m["shards"][0].update(episodes=-1), "says -1 of its size or episodes"),
        (lambda m: m["shards"][0].update(size=2**63), "of its size or episodes"),
        (lambda m: m["shards"][0].update(size="1"), "says '1' of its size or episodes"),
        (lambda m: m["shards"][1].update(name=m["shards"][0]["name"]), "appears twice"),
        (lambda m: m["shards"][0].pop("sha256"), "not a readable manifest: KeyError: 'sha256'"),
        (lambda m: m.update(shards=3), "not a readable manifest"),
    ],
)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_bad_manifest_is_always_an_error(
    make_set: Callable[..., Path], change: Callable[[dict[str, Any]], None], message: str, policy: str
) -> None:
    folder = make_set()
    edit_manifest(folder, change)
    with pytest.raises(ShardError, match=message):
        ShardSet(folder, policy)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", '"x"', "\x00\xff"])
def test_manifest_that_is_no_manifest(make_set: Callable[..., Path], text: str) -> None:
    folder = make_set()
    (folder / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(ShardError, match="is not a readable manifest"):
        ShardSet(folder)


def test_truncated_shard(make_set: Callable[..., Path]) -> None:
    folder = make_set(episodes=8, per_shard=3)
    path, offset, _ = member_of(folder, 4)
    path.write_bytes(path.read_bytes()[: offset + 10])
    with pytest.raises(ShardError, match=r"episodes-000001.tar is truncated or changed: \d+ bytes where"):
        ShardSet(folder)
    with pytest.warns(UserWarning, match="episode set-00[45] skipped .* truncated"):
        shards = ShardSet(folder, "skip")
    assert sorted(shards.skipped) == ["set-004", "set-005"]
    assert read_all(shards) == [f"set-{i:03d}" for i in (0, 1, 2, 3, 6, 7)]
    assert "not a whole tar" in " ".join(verify_set(folder))


def test_missing_shard(make_set: Callable[..., Path]) -> None:
    folder = make_set(episodes=8, per_shard=3)
    (folder / "episodes-000002.tar").unlink()
    with pytest.raises(ShardError, match=r"episodes-000002.tar is missing"):
        ShardSet(folder)
    with pytest.warns(UserWarning, match="is missing"):
        assert len(ShardSet(folder, "skip")) == 6
    assert verify_set(folder) == [f"{folder / 'episodes-000002.tar'} is missing"]


def test_nothing_left(make_set: Callable[..., Path]) -> None:
    folder = make_set(per_shard=100)
    (folder / "episodes-000000.tar").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ShardError, match="no usable episode is left"):
        ShardSet(folder, "skip")


@pytest.mark.parametrize("where", [0.02, 0.5, 0.97])
def test_flipped_byte(make_set: Callable[..., Path], where: float) -> None:
    """In the header, the image blocks or the small tensors: noticed when the episode is read."""
    folder = make_set(episodes=4)
    path, offset, size = member_of(folder, 1)
    flip(path, offset + int(where * size))
    shards = ShardSet(folder)
    assert shards.episode(0) is not None
    with pytest.raises(ShardError, match="episode set-001"):
        shards.episode(1)
    shards = ShardSet(folder, "skip")
    with pytest.warns(UserWarning, match=r"episode set-001 skipped \(1 so far\)"):
        assert read_all(shards) == ["set-000", "set-002", "set-003"]
    with warnings.catch_warnings(record=True) as caught:
        assert shards.episode(1) is None
    assert not caught  # it warns once
    faults = " ".join(verify_set(folder))
    assert "SHA-256 differs" in faults
    assert "set-001" in faults


def test_hashes_find_it_before_it_is_read(make_set: Callable[..., Path]) -> None:
    folder = make_set(episodes=6, per_shard=3)
    path, offset, size = member_of(folder, 1)
    flip(path, offset + size // 2)
    with pytest.raises(ShardError, match=r"episodes-000000.tar is corrupt: its SHA-256"):
        ShardSet(folder, verify=True)
    with pytest.warns(UserWarning, match="SHA-256"):
        shards = ShardSet(folder, "skip", verify=True)
    assert sorted(shards.skipped) == ["set-001"]
    assert len(read_all(shards)) == 5


def test_unknown_policy(make_set: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="policy 'ignore' is not one of"):
        ShardSet(make_set(), "ignore")
