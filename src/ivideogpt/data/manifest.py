"""The manifest of a shard set: what it says, and how whole shards and a manifest become a set in one step.

Rows of shards are taken one after another and written as they come, so a set of any size needs the memory of one row
and of the keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ivideogpt.data.blocks import codec_named, psnr
from ivideogpt.data.index import INDEX_PATTERN, Index, IndexBuilder
from ivideogpt.data.statistics import KINDS, BySource, RunningStats, add_rows, merge_into, overall, results

FORMAT = "ivideogpt-shards"
SCHEMA_VERSION = 2
"""1 has the episodes of each shard in the manifest, 2 in an index beside it."""

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
SHARD_NAME = "episodes"
SHARD_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar\Z")  # a plain file name


@dataclasses.dataclass
class PixelError:
    """What frames have lost.

    Args:
        squared: Sum of squared differences of all values.
        values: Their number.
        worst: The largest mean of an episode.
    """

    squared: int = 0
    values: int = 0
    worst: float = 0.0

    def add(self, other: PixelError) -> None:
        """Adds what others have lost."""
        self.squared, self.values = self.squared + other.squared, self.values + other.values
        self.worst = max(self.worst, other.worst)

    def decibel(self) -> dict[str, float | None]:
        """PSNR over all values, and of the worst episode."""
        return {"all": psnr(self.squared, self.values), "worst": psnr(self.worst, 1)}


@dataclasses.dataclass
class ShardRow:
    """What the manifest needs to know of one shard.

    Args:
        size: Bytes of the tar file.
        sha256: Its hash.
        members: Its episodes: key, offset, size, crc32 and what `shards.encoded` says of each.
        statistics: Of actions and rewards.
        codec: Of all its episodes; empty while it has none.
        error: What a codec that loses something has lost.
    """

    size: int
    sha256: str
    members: list[dict[str, Any]]
    statistics: BySource
    codec: str
    error: PixelError

    def add(self, key: str, offset: int, size: int, crc32: int, info: dict[str, Any]) -> None:
        """Adds an episode.

        Args:
            key: Of the episode.
            offset: Where its record begins in the file.
            size: Bytes of its record.
            crc32: Of its record.
            info: What `shards.describe` says of it.

        Raises:
            ValueError: It has another codec than those before it.
        """
        if self.codec not in ("", info["codec"]):
            raise ValueError(f"one shard has one codec, not {self.codec!r} and {info['codec']!r}")
        self.codec = info["codec"]
        self.error.add(info["error"])
        add_rows(self.statistics, info["source"], info)
        kept = {name: value for name, value in info.items() if name not in (*KINDS, "codec", "error")}
        self.members.append({"key": key, "offset": offset, "size": size, "crc32": crc32} | kept)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON that keeps every bit."""
        statistics = {
            source: {kind: stats.state() for kind, stats in of_source.items()}
            for source, of_source in self.statistics.items()
        }
        row = {"size": self.size, "sha256": self.sha256, "members": self.members, "statistics": statistics}
        return row | {"codec": self.codec, "error": dataclasses.asdict(self.error)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> ShardRow:
        """What `to_json` was taken of."""
        statistics = {
            source: {kind: RunningStats.restored(state) for kind, state in of_source.items()}
            for source, of_source in row["statistics"].items()
        }
        error = PixelError(**row["error"])
        return cls(row["size"], row["sha256"], row["members"], statistics, row["codec"], error)


Staged = Sequence[tuple[Path, Callable[[], ShardRow]]]


def commit_set(
    out: Path,
    staged: Staged,
    *,
    name: str = SHARD_NAME,
    command: str = "",
    extra: dict[str, Any] | None = None,
    quarantine: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Makes whole shards a set: moves them into `out`, writes the index, replaces the manifest, removes an older set.

    A failure puts the shards back. Where a kill came between the moves and the manifest, calling it again goes on.

    Args:
        out: Folder of the set, on the file system of the shards.
        staged: (file, its row) of each shard in order.
        name: Prefix of the shard files.
        command: The command line that makes the set.
        extra: Further JSON for the manifest.
        quarantine: What was left out, a line of `quarantine.jsonl` each; nothing makes no file.

    Returns:
        The manifest but for its shards.

    Raises:
        ValueError: No shard, or two episodes with one key.
        OSError: Something cannot be written.
    """
    if not staged:
        raise ValueError(f"no episode was written to {out}; an empty set is refused")
    summed, digest = SetSums(), hashlib.sha256()
    shards: list[dict[str, Any]] = []
    for _, load in staged:
        row = load()
        summed.add(row)
        digest.update(row.sha256.encode())
        shards.append({"name": "", "size": row.size, "sha256": row.sha256, "episodes": len(row.members)})
    index = summed.index.build()
    twice = index.repeated_key()
    if twice is not None:
        raise ValueError(f"two episodes have the key {twice!r}")
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "converter": f"ivideogpt {package_version()}",
        "command": command,
        **summed.summary(len(staged)),
        "quarantine": {"episodes": episodes_of(quarantine), "file": QUARANTINE if quarantine else None},
        "extra": extra or {},
    }
    old = set(_listed_shards(out))
    names = [f"{name}-{index:06d}.tar" for index in range(len(staged))]
    if old & set(names):  # the old shards must stay until the manifest is replaced: put the content into the name
        names = [f"{name}-{digest.hexdigest()[:8]}-{index:06d}.tar" for index in range(len(staged))]
    for shard, target in zip(shards, names, strict=True):
        shard["name"] = target
    moved: list[tuple[Path, Path]] = []
    kept = {path.name for path in _indices(out)}
    index_file: Path | None = None
    try:
        for (path, _), target in zip(staged, names, strict=True):
            if path.exists() or not (out / target).exists():  # else it was moved before a kill
                os.replace(path, out / target)
            moved.append((path, out / target))
        index_file, manifest["index"] = _write_index(out, index)
        _write_manifest(out / MANIFEST, manifest, shards, [json.dumps(line) for line in quarantine])
    except BaseException:
        if index_file is not None and index_file.name not in kept:
            index_file.unlink(missing_ok=True)
        for path, target_path in moved:
            with contextlib.suppress(OSError):
                os.replace(target_path, path)
        raise
    ours = _names(name)  # also what a killed writer left unlisted
    for path in out.glob("*.tar"):
        if path.name not in names and (path.name in old or ours.match(path.name)):
            path.unlink(missing_ok=True)
    for path in _indices(out):
        if path != index_file:
            path.unlink(missing_ok=True)
    return manifest


def episodes_of(quarantine: Iterable[dict[str, Any]]) -> int:
    """Episodes that lines of a quarantine file stand for."""
    return sum(int(line.get("episodes", 1)) for line in quarantine)


def _indices(folder: Path) -> list[Path]:
    return [path for path in folder.glob("index-*.safetensors") if INDEX_PATTERN.match(path.name)]


def _write_index(out: Path, index: Index) -> tuple[Path, dict[str, Any]]:
    """Writes an index under the name of its hash; the file, and what the manifest says of it."""
    aside = out / f".index.{os.getpid()}.partial"
    try:
        index.write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        size, sha256 = aside.stat().st_size, file_sha256(aside)
        path = out / f"index-{sha256[:16]}.safetensors"
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path, {"name": path.name, "size": size, "sha256": sha256}


def _names(name: str) -> re.Pattern[str]:
    """What the shards of a set are called."""
    return re.compile(rf"{name}(-[0-9a-f]{{8}})?-\d{{6}}\.tar\Z")


class SetSums:
    """What the manifest says of all shards together."""

    def __init__(self) -> None:
        self.index = IndexBuilder()
        self.episodes, self.frames, self.has_rewards = 0, 0, True
        self.resolutions, self.action_dims = set[tuple[int, int]](), set[int]()
        self.sources: dict[str, dict[str, Any]] = {}
        self.licences: set[str] = set()
        self.codec, self.error = "", PixelError()
        self.statistics: BySource = {}

    def add(self, row: ShardRow) -> None:
        if self.codec and row.codec and self.codec != row.codec:
            raise ValueError(f"one set has one codec, not {self.codec!r} and {row.codec!r}")
        self.codec = row.codec or self.codec
        self.error.add(row.error)
        self.index.add(row.members)
        merge_into(self.statistics, row.statistics)
        self.episodes += len(row.members)
        for member in row.members:
            self.frames += member["frames"]
            self.has_rewards &= member["has_rewards"]
            self.resolutions.add(tuple(member["resolution"]))
            self.action_dims.add(member["action_dim"] or 0)
            self.licences.add(member["licence"])
            blank = {"episodes": 0, "frames": 0, "licence": member["licence"]}
            entry = self.sources.setdefault(member["source"], blank)
            entry["episodes"] += 1
            entry["frames"] += member["frames"]

    def summary(self, shards: int) -> dict[str, Any]:
        """What the episodes alone decide of the manifest of so many shards."""
        codec = codec_named(self.codec)
        described: dict[str, Any] = {"name": codec.name, "block_length": codec.block_length, "lossless": codec.lossless}
        return {
            "codec": described | ({} if codec.lossless else {"psnr": self.error.decibel()}),
            "counts": {"shards": shards, "episodes": self.episodes, "frames": self.frames},
            "resolutions": sorted(self.resolutions),
            "action_dims": sorted(self.action_dims),
            "has_rewards": self.has_rewards,
            "sources": {
                source: entry | {"statistics": results(self.statistics[source])}
                for source, entry in self.sources.items()
            },
            "licences": sorted(self.licences),
            "statistics": overall(self.statistics),
        }


def refuse_to_replace(out: Path, overwrite: bool, unfinished: bool = False) -> None:
    """Raises ValueError where a folder holds a set or tar files that nobody asked to replace.

    Where a conversion is `unfinished`, shards that have their names already are its own.
    """
    if (out / MANIFEST).exists() and not overwrite:
        raise ValueError(f"{out} holds a shard set already; choose another folder or overwrite it")
    own = _names(SHARD_NAME)
    if not overwrite and any(not (unfinished and own.match(path.name)) for path in out.glob("*.tar")):
        raise ValueError(f"{out} holds tar files; choose another folder or overwrite it")


def _write_manifest(
    path: Path, manifest: dict[str, Any], shards: Sequence[dict[str, Any]], quarantine: list[str]
) -> None:
    """Replaces the manifest, with a line for each shard, and then the list of what was left out."""
    head = json.dumps(manifest, indent=1).removesuffix("\n}")
    rows = ",\n".join(f"  {json.dumps(shard)}" for shard in shards)
    with list_left_out(path.parent, quarantine), _written(path, [f'{head},\n "shards": [\n{rows}\n ]\n}}']) as whole:
        os.replace(whole, path)


@contextlib.contextmanager
def list_left_out(folder: Path, quarantine: Sequence[str]) -> Iterator[None]:
    """Writes the list of what was left out of a set aside, and replaces the old one after the block."""
    path = folder / QUARANTINE
    with _written(path, quarantine) as whole:
        yield
        if quarantine:
            os.replace(whole, path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step: aside, flushed to disk, renamed."""
    with _written(path, [json.dumps(value)]) as whole:
        os.replace(whole, path)


@contextlib.contextmanager
def _written(path: Path, lines: Iterable[str]) -> Iterator[Path]:
    """A hidden file beside `path` with these lines, on the disk; removed unless the block renames it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        yield aside
    finally:
        aside.unlink(missing_ok=True)


def package_version() -> str:
    """Version of the installed package, or `unknown` when it runs from a bare source tree."""
    try:
        return importlib.metadata.version("ivideogpt")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _listed_shards(folder: Path) -> list[str]:
    """Names of the shards of the set that is in a folder now; none if there is no readable manifest."""
    try:
        names = [str(shard["name"]) for shard in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if SHARD_PATTERN.match(name)]  # never a path that leaves the folder
