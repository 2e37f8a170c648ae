"""The index of a shard set: columns that processes share, nothing of them believed, and sets without one."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ivideogpt.data.episode import Episode
from ivideogpt.data.index import NAME, Index, IndexBuilder
from ivideogpt.data.manifest import MANIFEST, file_sha256
from ivideogpt.data.reader import ShardError, ShardSet
from ivideogpt.data.safetensors_header import read_header
from ivideogpt.data.shards import ShardSetWriter
from ivideogpt.data.verification import verify_set


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def index_of(folder: Path) -> Path:
    return folder / json.loads((folder / MANIFEST).read_text())["index"]["name"]


def replace_index(folder: Path, data: bytes) -> None:
    """Puts another index in, with its right name, size and hash in the manifest."""
    index_of(folder).unlink()
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"index-{sha256[:16]}.safetensors"
    (folder / name).write_bytes(data)
    edit_manifest(folder, lambda manifest: manifest.update(index={"name": name, "size": len(data), "sha256": sha256}))


def edit_index(folder: Path, change: Callable[[dict[str, np.ndarray], dict[str, Any]], Any]) -> None:
    path = index_of(folder)
    data = path.read_bytes()
    metadata, _ = read_header(lambda offset, count: data[offset : offset + count], len(data))
    columns, names = {name: column.copy() for name, column in load_file(path).items()}, json.loads(metadata[NAME])
    change(columns, names)
    save_file(columns, folder / "edited", {NAME: json.dumps(names)})
    edited = (folder / "edited").read_bytes()
    (folder / "edited").unlink()
    replace_index(folder, edited)


def as_version_1(folder: Path) -> None:
    """Rewrites the manifest as the first version had it: with the episodes of each shard, and without an index."""
    index = Index.open(index_of(folder))
    rows = [index.row(row) for row in range(len(index))]
    licences = {row["key"]: "CC0-1.0" for row in rows}

    def change(manifest: dict[str, Any]) -> None:
        manifest["schema_version"] = 1
        del manifest["index"]
        for source in manifest["sources"].values():
            del source["statistics"]
        for number, shard in enumerate(manifest["shards"]):
            del shard["episodes"]
            shard["members"] = [
                {name: row[name] for name in ("key", "offset", "size", "crc32", "frames", "fps", "source")}
                | {"resolution": [row["height"], row["width"]], "action_dim": row["action_dim"] or None}
                | {"has_rewards": bool(row["has_rewards"]), "licence": licences[row["key"]]}
                for row in rows if row["shard"] == number
            ]  # fmt: skip

    index_of(folder).unlink()
    edit_manifest(folder, change)


def test_rows(tmp_path: Path, make_episode: Callable[..., Episode]) -> None:
    with ShardSetWriter(tmp_path / "set", shard_episodes=2) as writer:
        for i, (camera, source) in enumerate([("left", "a"), ("right", "b"), ("left", "b")]):
            width = None if i == 1 else 4
            writer.write(f"e{i}", make_episode(10 + i, action_dim=width, camera=camera, source=source, fps=i + 0.5))
    shards = ShardSet(tmp_path / "set")
    assert [shards.camera(i) for i in range(3)] == ["left", "right", "left"]
    assert [shards.source(i) for i in range(3)] == ["a", "b", "b"]
    row = shards.index.row(1)
    path, offset, size = shards.place(1)
    assert zlib.crc32(path.read_bytes()[offset : offset + size]) == row.pop("crc32")
    assert row == {
        "key": "e1", "shard": 0, "offset": offset, "size": size, "frames": 11, "height": 16, "width": 16,
        "action_dim": 0, "has_rewards": 1, "fps": 1.5, "source": "b", "camera": "right",
    }  # fmt: skip
    assert {name: shards.index[name].dtype.str for name in ("shard", "offset", "crc32", "fps")} == {
        "shard": "<i4", "offset": "<i8", "crc32": "<u4", "fps": "<f8",
    }  # fmt: skip
    columns = load_file(index_of(tmp_path / "set"))  # what others read with safetensors alone
    assert columns["keys"].tobytes() == b"e0e1e2" and columns["key_ends"].tolist() == [2, 4, 6]
    statistics = {name: source["statistics"] for name, source in shards.manifest["sources"].items()}
    first = shards.episode(0)
    assert first is not None and first.actions is not None and first.rewards is not None
    np.testing.assert_allclose(statistics["a"]["actions"]["mean"], first.actions[:-1].mean(0), atol=1e-6)
    np.testing.assert_allclose(statistics["a"]["rewards"]["max"], [first.rewards[1:].max()])
    assert (statistics["a"]["actions"]["count"], statistics["b"]["actions"]["count"]) == (9, 11)
    assert shards.manifest["statistics"]["actions"]["count"] == 20


def test_a_sent_set_maps_the_index_again(make_set: Callable[..., Path]) -> None:
    """What a loading process is sent names the file and holds no rows."""
    folder = make_set(episodes=200, per_shard=100, lengths=[3])
    shards = ShardSet(folder)
    sent = pickle.dumps(shards.index)
    assert len(sent) < 500
    back = pickle.loads(sent)  # noqa: S301
    for name in ("offset", "frames", "keys"):
        np.testing.assert_array_equal(back[name], shards.index[name])
        assert not back[name].flags.writeable
    code = "import pickle, sys; print(len(pickle.load(sys.stdin.buffer)))"
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, check=True)
    assert done.stdout.strip() == b"200"
    taken = shards.index.take(np.array([5, 190]))
    assert [taken.key(0), taken.key(1)] == ["set-005", "set-190"]
    assert pickle.loads(pickle.dumps(taken)).row(1) == shards.index.row(190)  # noqa: S301


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, n: c["size"].__setitem__(0, 10**9), "episode 'set-000' lies outside its shard"),
        (lambda c, n: c["size"].__setitem__(0, -1), "lies outside its shard"),
        (lambda c, n: c["offset"].__setitem__(7, -1), "episode 'set-007' lies outside its shard"),
        (lambda c, n: c["offset"].__setitem__(1, 2**63 - 1), "lies outside its shard"),
        (lambda c, n: c["frames"].__setitem__(2, 0), "episode 'set-002' has no frames"),
        (lambda c, n: c["frames"].__setitem__(2, 1000), r"but it lists \d+ frames"),
        (lambda c, n: c["height"].__setitem__(2, -5), "has no pixels"),
        (lambda c, n: c["action_dim"].__setitem__(2, -5), "has actions of a width below 0"),
        (lambda c, n: c["fps"].__setitem__(2, np.nan), "has a frame rate that is no positive number"),
        (lambda c, n: c["shard"].__setitem__(0, 1), "are not the 8 of the shards"),
        (lambda c, n: c["shard"].__setitem__(7, 99), "are not the 8 of the shards"),
        (lambda c, n: c["source"].__setitem__(1, 1), "has a source without a name"),
        (lambda c, n: c["camera"].__setitem__(1, -1), "has a camera without a name"),
        (lambda c, n: n.update(cameras="left"), "cameras is no list of names"),
        (lambda c, n: n.pop("sources"), "KeyError: 'sources'"),
        (lambda c, n: c["keys"].__setitem__(6, ord("/")), "episode key '/et-000' is not allowed|is not allowed"),
        (lambda c, n: c["keys"].__setitem__(7, ord("-")), "episode key '-et-001' is not allowed"),
        (lambda c, n: c["keys"].__setitem__(slice(7, 14), c["keys"][:7]), "'set-000' appears twice"),
        (lambda c, n: c["key_ends"].__setitem__(7, 1000), "the keys do not fit their lengths"),
        (lambda c, n: c["key_ends"].__setitem__(3, 0), "the keys do not fit their lengths"),
        (lambda c, n: c["key_ends"].__setitem__(0, -1), "the keys do not fit their lengths"),
        (lambda c, n: c["key_ends"].__setitem__(0, 14), "is not allowed"),  # the second one is empty
        (lambda c, n: c.pop("fps"), "columns"),
        (lambda c, n: c.update(extra=c["fps"]), "columns"),
        (lambda c, n: c.update(frames=c["frames"].astype(np.int64)), "columns"),
        (lambda c, n: c.update(frames=c["frames"][:5]), "column 'frames' of shape"),
        (lambda c, n: c.update({k: v[:7] for k, v in c.items() if k != "keys"}), "7 episodes that are not the 8"),
        (lambda c, n: c.update({k: v[:0] for k, v in c.items()}), "0 episodes that are not the 8"),
    ],
)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_indices_that_lie(
    make_set: Callable[..., Path],
    change: Callable[[dict[str, np.ndarray], dict[str, Any]], Any],
    message: str,
    policy: str,
) -> None:
    """Always an error: nothing can be trusted without it."""
    folder = make_set()
    edit_index(folder, lambda columns, names: None)
    assert len(ShardSet(folder)) == 8
    edit_index(folder, change)
    with pytest.raises(ShardError, match=message):
        ShardSet(folder, policy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(sha256="0" * 64), "is corrupt: its SHA-256 is not the manifest's"),
        (lambda i: i.update(size=i["size"] + 1), r"is truncated or changed: \d+ bytes where the manifest says"),
        (lambda i: i.update(name="../" + i["name"]), r"index name '\.\./index-.* is not index-"),
        (lambda i: i.update(name="/etc/passwd"), "index name '/etc/passwd' is not index-"),
        (lambda i: i.update(name="index-0123456789abcdef.safetensors\n"), "is not index-"),
        (lambda i: i.update(name="index-0123456789abcdef.safetensors"), "is missing"),
        (lambda i: i.update(name=7), "is not a readable manifest: TypeError"),
        (lambda i: i.pop("sha256"), "is not a readable manifest: KeyError"),
    ],
)
def test_what_the_manifest_says_of_the_index(
    make_set: Callable[..., Path], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = make_set()
    edit_manifest(folder, lambda manifest: change(manifest["index"]))
    with pytest.raises(ShardError, match=message):
        ShardSet(folder)
    with pytest.raises(ShardError, match=message):
        verify_set(folder)


def test_damaged_files(make_set: Callable[..., Path]) -> None:
    folder = make_set()
    path = index_of(folder)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ShardError, match="is truncated or changed"):
        ShardSet(folder)
    spoilt = bytearray(data)
    spoilt[-1] ^= 1
    path.write_bytes(spoilt)
    with pytest.raises(ShardError, match="is corrupt"):
        ShardSet(folder)
    path.unlink()
    with pytest.raises(ShardError, match="is missing; without its index"):
        ShardSet(folder)


@pytest.mark.parametrize("cut", [0, 1, 8, 100, 500, -1])
def test_truncated_with_its_hash(make_set: Callable[..., Path], cut: int) -> None:
    folder = make_set()
    replace_index(folder, index_of(folder).read_bytes()[:cut])
    with pytest.raises(ShardError, match="is not a readable index"):
        ShardSet(folder)


@pytest.mark.parametrize("length", [2**40, 2**63, 16 * 2**20 + 1])
def test_a_header_length_that_lies(make_set: Callable[..., Path], length: int) -> None:
    folder = make_set()
    replace_index(folder, length.to_bytes(8, "little") + index_of(folder).read_bytes()[8:])
    with pytest.raises(ShardError, match="is not a readable index: header of"):
        ShardSet(folder)


def test_overwriting_removes_the_old_index(make_set: Callable[..., Path], make_episode: Callable[..., Episode]) -> None:
    folder = make_set()
    old = index_of(folder)
    stray, mine = folder / "index-0123456789abcdef.safetensors", folder / "index-mine.safetensors"
    for path in (stray, mine):  # left by a writer that was killed; of somebody else
        path.write_bytes(b"x")
    with ShardSetWriter(folder, overwrite=True) as writer:
        writer.write("new", make_episode())
    assert not old.exists() and not stray.exists() and mine.exists()
    assert verify_set(folder) == []
    same = index_of(folder)
    with ShardSetWriter(folder, overwrite=True) as writer:
        writer.write("new", make_episode())
    assert index_of(folder).exists()
    assert same.name == index_of(folder).name
    assert file_sha256(same) == json.loads((folder / MANIFEST).read_text())["index"]["sha256"]


def test_version_1(make_set: Callable[..., Path]) -> None:
    folder = make_set()
    shards = ShardSet(folder)
    wanted = [shards.index.row(i) for i in range(8)]
    as_version_1(folder)
    old = ShardSet(folder)
    assert [old.index.row(i) for i in range(8)] == wanted
    assert "members" not in old.manifest["shards"][0]  # what it takes in memory is freed
    assert old.episode(3) is not None
    assert pickle.loads(pickle.dumps(old)).key(3) == "set-003"  # noqa: S301
    assert verify_set(folder) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(key="../../x"), r"episode key '\.\./\.\./x' is not allowed"),
        (lambda m: m.update(key="ä"), r"episode key '\\\\xe4' is not allowed"),
        (lambda m: m.update(key="set-001"), "'set-001' appears twice"),
        (lambda m: m.update(key=None), "not a readable manifest"),
        (lambda m: m.update(size=10**9), "lies outside its shard"),
        (lambda m: m.update(offset=-1), "lies outside its shard"),
        (lambda m: m.update(offset=2**80), "not a readable manifest: OverflowError"),
        (lambda m: m.update(frames=1.5), "not a readable manifest: TypeError"),
        (lambda m: m.update(frames=13), "frames"),
        (lambda m: m.update(resolution=[16]), "not a readable manifest"),
        (lambda m: m.pop("crc32"), "not a readable manifest: KeyError: 'crc32'"),
    ],
)
def test_version_1_that_lies(
    make_set: Callable[..., Path], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = make_set()
    as_version_1(folder)
    edit_manifest(folder, lambda manifest: change(manifest["shards"][0]["members"][0]))
    with pytest.raises(ShardError, match=message):
        ShardSet(folder)


def test_a_repeated_key() -> None:
    builder = IndexBuilder()
    row = {"offset": 1, "size": 1, "crc32": 0, "frames": 1, "fps": 1, "resolution": [1, 1], "action_dim": None}
    keys = ["a", "ab", "b", "abc", "ba", "abd", "ab"]
    builder.add([row | {"key": key, "has_rewards": False} for key in keys])
    index = builder.build()
    assert [index.key(i) for i in range(len(index))] == keys
    assert index.key(-1) == "ab"
    assert index.repeated_key() == "ab"
    assert index.take(np.arange(6)).repeated_key() is None


# What `verify` finds


def test_verify_finds_what_the_index_says_wrong(make_set: Callable[..., Path]) -> None:
    folder = make_set(lengths=[12], camera="front")

    def change(columns: dict[str, np.ndarray], names: dict[str, Any]) -> None:
        columns["fps"][1] = 99.0
        columns["action_dim"][2] = 7
        columns["has_rewards"][3] = 0
        names["cameras"] = ["rear"]

    assert verify_set(folder) == []
    edit_index(folder, change)
    faults = verify_set(folder)
    assert "set-001: fps is 99.0 in the index, 10.0 in the record" in faults
    assert "set-002: action_dim is 7 in the index, 4 in the record" in faults
    assert "set-003: has_rewards is 0 in the index, 1 in the record" in faults
    assert "set-004: camera is 'rear' in the index, 'front' in the record" in faults
    assert len(faults) == 3 + 8


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda m: m["statistics"]["actions"]["mean"].__setitem__(1, 0.5), "statistics.actions.mean is .*0.5.* give"),
        (lambda m: m["statistics"].update(rewards=None), "statistics.rewards is None, the records give {'count'"),
        (lambda m: m["statistics"]["actions"]["max"].pop(), r"statistics.actions.max is \["),
        (
            lambda m: m["sources"]["synthetic"]["statistics"]["rewards"].update(count=3),
            r"sources.synthetic.statistics.rewards.count is 3, the records give 88",
        ),
        (lambda m: m["sources"]["synthetic"].update(licence="MIT"), "sources.synthetic.licence is MIT"),
        (lambda m: m["sources"].update(other=m["sources"].pop("synthetic")), "sources is {'other'"),
        (lambda m: m.update(resolutions=[[64, 64]]), r"resolutions is \[\[64, 64\]\], the records give \[\[16, 16\]\]"),
        (lambda m: m.update(action_dims=[4, 5]), r"action_dims is \[4, 5\], the records give \[4\]"),
        (lambda m: m.update(has_rewards=False), "has_rewards is False, the records give True"),
        (lambda m: m.update(licences=[]), r"licences is \[\], the records give \['CC0-1.0'\]"),
        (lambda m: m["codec"].update(lossless=False), "codec.lossless is False, the records give True"),
        (lambda m: m.pop("codec"), "its codec is 'delta-zstd', the manifest says None"),
        (lambda m: m["codec"].update(name="jpeg-95"), "its codec is 'delta-zstd', the manifest says"),
    ],
)
def test_verify_finds_what_the_manifest_says_wrong(
    make_set: Callable[..., Path], change: Callable[[dict[str, Any]], Any], fault: str
) -> None:
    folder = make_set(lengths=[12])
    edit_manifest(folder, change)
    faults = verify_set(folder)
    assert faults
    for line in faults:
        assert re.search(fault, line)


def test_verify_finds_records_that_are_not_the_ones_of_the_index(make_set: Callable[..., Path]) -> None:
    """Two records of equal shape change places: each is whole, but not the one of its key."""
    folder = make_set(lengths=[12])

    def swap(columns: dict[str, np.ndarray], names: dict[str, Any]) -> None:
        for name in ("offset", "size"):
            columns[name][[0, 1]] = columns[name][[1, 0]]

    edit_index(folder, swap)
    faults = " ".join(verify_set(folder))
    assert "members that are not the 3 of the index" in faults
    assert "episode set-000: its CRC-32 is not the index's" in faults and "episode set-001: its CRC-32" in faults


def test_a_record_of_another_length(make_set: Callable[..., Path]) -> None:
    folder = make_set(lengths=[12])
    edit_index(folder, lambda columns, names: columns["frames"].__setitem__(0, 17))
    edit_manifest(folder, lambda manifest: manifest["counts"].update(frames=8 * 12 + 5))
    with pytest.raises(ShardError, match=r"it holds \[12, 16, 16\] frames and pixels, the index says \[17, 16, 16\]"):
        ShardSet(folder).record(0)
    assert "the index says [17" in " ".join(verify_set(folder))


def test_verify_of_version_1_compares_what_it_has(make_set: Callable[..., Path]) -> None:
    folder = make_set(lengths=[12], camera="front")
    as_version_1(folder)
    assert verify_set(folder) == []
    edit_manifest(folder, lambda manifest: manifest["statistics"]["actions"].update(count=5))
    assert verify_set(folder) == [f"{folder / MANIFEST}: statistics.actions.count is 5, the records give 88"]


def test_verify_lossy(tmp_path: Path, make_episode: Callable[..., Episode]) -> None:
    with ShardSetWriter(tmp_path / "set", codec="jpeg-90") as writer:
        for i in range(3):
            writer.write(f"e{i}", make_episode(seed=i))
    assert verify_set(tmp_path / "set") == []
    edit_manifest(tmp_path / "set", lambda manifest: manifest["codec"]["psnr"].update(worst=80.0))
    (fault,) = verify_set(tmp_path / "set")
    assert "codec.psnr.worst is 80.0, the records give" in fault
