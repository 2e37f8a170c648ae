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

import numpy as np

from ivideogpt.data.blocks import codec_named, psnr

FORMAT = "ivideogpt-shards"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
SHARD_NAME = "episodes"
SHARD_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar\Z")  # a plain file name


class RunningStats:
    """Mean, spread and range of rows (N, D), added up in float64."""

    def __init__(self) -> None:
        self.count, self.sums, self.squares = 0, np.zeros(0), np.zeros(0)
        self.low, self.high = np.zeros(0), np.zeros(0)
        self.mixed = False

    def add(self, rows: np.ndarray | None) -> None:
        if rows is None or len(rows) == 0 or self.mixed:
            return
        rows = rows.astype(np.float64)
        if self.count == 0:
            self.sums, self.squares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
            self.low, self.high = rows.min(0), rows.max(0)
        elif rows.shape[1] != len(self.sums):
            self.mixed = True  # widths differ within the set: no statistics make sense
            return
        self.count += len(rows)
        self.sums, self.squares = self.sums + rows.sum(0), self.squares + (rows**2).sum(0)
        self.low, self.high = np.minimum(self.low, rows.min(0)), np.maximum(self.high, rows.max(0))

    def merge(self, other: RunningStats) -> None:
        """Adds what another one has added up."""
        if other.mixed or (self.count and other.count and len(self.sums) != len(other.sums)):
            self.mixed = True
        if self.mixed or other.count == 0:
            return
        if self.count == 0:
            self.low, self.high = other.low, other.high
            self.sums, self.squares = np.zeros_like(other.sums), np.zeros_like(other.squares)
        self.count += other.count
        self.sums, self.squares = self.sums + other.sums, self.squares + other.squares
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)

    def state(self) -> dict[str, Any]:
        """All that was added up, as JSON that keeps every bit."""
        arrays = {name: getattr(self, name).tolist() for name in ("sums", "squares", "low", "high")}
        return {"count": self.count, "mixed": self.mixed} | arrays

    @classmethod
    def restored(cls, state: dict[str, Any]) -> RunningStats:
        """What `state` was taken of."""
        stats = cls()
        stats.count, stats.mixed = int(state["count"]), bool(state["mixed"])
        for name in ("sums", "squares", "low", "high"):
            setattr(stats, name, np.asarray(state[name], np.float64))
        return stats

    def result(self) -> dict[str, Any] | None:
        if self.count == 0 or self.mixed:
            return None
        mean = self.sums / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        named = {"mean": mean, "std": std, "min": self.low, "max": self.high}
        return {"count": self.count} | {name: value.tolist() for name, value in named.items()}


@dataclasses.dataclass
class Error:
    """What frames have lost.

    Args:
        squared: Sum of squared differences of all values.
        values: Their number.
        worst: The largest mean of an episode.
    """

    squared: int = 0
    values: int = 0
    worst: float = 0.0

    def add(self, other: Error) -> None:
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
        members: Its episodes: key, offset, size, crc32 and what `summary` says but the arrays.
        statistics: Of `actions` and `rewards`; those of several shards can be merged.
        codec: Of all its episodes.
        error: What a codec that loses something has lost.
    """

    size: int
    sha256: str
    members: list[dict[str, Any]]
    statistics: dict[str, RunningStats]
    codec: str
    error: Error

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON that keeps every bit."""
        statistics = {name: stats.state() for name, stats in self.statistics.items()}
        row = {"size": self.size, "sha256": self.sha256, "members": self.members, "statistics": statistics}
        return row | {"codec": self.codec, "error": dataclasses.asdict(self.error)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> ShardRow:
        """What `to_json` was taken of."""
        statistics = {name: RunningStats.restored(state) for name, state in row["statistics"].items()}
        error = Error(**row["error"])
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
    """Makes whole shards a set: moves them into `out`, then replaces the manifest, then removes an older set's shards.

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
    summed, digest = _Sums(), hashlib.sha256()
    for _, load in staged:
        row = load()
        summed.add(row)
        digest.update(row.sha256.encode())
    manifest = summed.manifest(len(staged), command, extra or {}, quarantine)
    old = set(_listed_shards(out))
    names = [f"{name}-{index:06d}.tar" for index in range(len(staged))]
    if old & set(names):  # the old shards must stay until the manifest is replaced: put the content into the name
        names = [f"{name}-{digest.hexdigest()[:8]}-{index:06d}.tar" for index in range(len(staged))]
    moved: list[tuple[Path, Path]] = []
    try:
        for (path, _), target in zip(staged, names, strict=True):
            if path.exists() or not (out / target).exists():  # else it was moved before a kill
                os.replace(path, out / target)
            moved.append((path, out / target))
        _write_manifest(out / MANIFEST, manifest, staged, names, [json.dumps(line) for line in quarantine])
    except BaseException:
        for path, target_path in moved:
            with contextlib.suppress(OSError):
                os.replace(target_path, path)
        raise
    ours = _names(name)  # also what a killed writer left unlisted
    for path in out.glob("*.tar"):
        if path.name not in names and (path.name in old or ours.match(path.name)):
            path.unlink(missing_ok=True)
    return manifest


def _names(name: str) -> re.Pattern[str]:
    """What the shards of a set are called."""
    return re.compile(rf"{name}(-[0-9a-f]{{8}})?-\d{{6}}\.tar\Z")


class _Sums:
    """What the manifest says of all shards together."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.frames, self.has_rewards = 0, True
        self.resolutions, self.action_dims = set[tuple[int, int]](), set[int]()
        self.sources: dict[str, dict[str, Any]] = {}
        self.licences: set[str] = set()
        self.codec, self.error = "", Error()
        self.statistics = {"actions": RunningStats(), "rewards": RunningStats()}

    def add(self, row: ShardRow) -> None:
        if self.codec not in ("", row.codec):
            raise ValueError(f"one set has one codec, not {self.codec!r} and {row.codec!r}")
        self.codec = row.codec
        self.error.add(row.error)
        for member in row.members:
            if member["key"] in self.keys:
                raise ValueError(f"two episodes have the key {member['key']!r}")
            self.keys.add(member["key"])
            self.frames += member["frames"]
            self.has_rewards &= member["has_rewards"]
            self.resolutions.add(tuple(member["resolution"]))
            self.action_dims.add(member["action_dim"] or 0)
            self.licences.add(member["licence"])
            blank = {"episodes": 0, "frames": 0, "licence": member["licence"]}
            entry = self.sources.setdefault(member["source"], blank)
            entry["episodes"] += 1
            entry["frames"] += member["frames"]
        for name, stats in self.statistics.items():
            stats.merge(row.statistics[name])

    def manifest(
        self, shards: int, command: str, extra: dict[str, Any], quarantine: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        codec = codec_named(self.codec)
        described: dict[str, Any] = {"name": codec.name, "block_length": codec.block_length, "lossless": codec.lossless}
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "converter": f"ivideogpt {package_version()}",
            "command": command,
            "codec": described | ({} if codec.lossless else {"psnr": self.error.decibel()}),
            "counts": {"shards": shards, "episodes": len(self.keys), "frames": self.frames},
            "resolutions": sorted(self.resolutions),
            "action_dims": sorted(self.action_dims),
            "has_rewards": self.has_rewards,
            "sources": self.sources,
            "licences": sorted(self.licences),
            "statistics": {name: stats.result() for name, stats in self.statistics.items()},
            "quarantine": {"episodes": len(quarantine), "file": QUARANTINE if quarantine else None},
            "extra": extra,
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
    path: Path, manifest: dict[str, Any], staged: Staged, names: list[str], quarantine: list[str]
) -> None:
    """Replaces the manifest, with a line for each shard, and then the list of what was left out."""
    head = json.dumps(manifest, indent=1).removesuffix("\n}")

    def lines() -> Iterator[str]:
        yield f'{head},\n "shards": ['
        for number, (name, (_, load)) in enumerate(zip(names, staged, strict=True), start=1):
            row = load()
            shard = {"name": name, "size": row.size, "sha256": row.sha256, "members": row.members}
            yield f"  {json.dumps(shard)}{',' if number < len(names) else ''}"
        yield " ]\n}"

    with list_left_out(path.parent, quarantine), _written(path, lines()) as whole:
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
