"""Writes episodes as WebDataset shards with a manifest, so that a kill or a full disk leaves no broken set.

A set is a folder: `NAME-000000.tar`, `NAME-000001.tar`, ... with one member `KEY.safetensors` an episode (see
`codec`), and `manifest.json`, which is the only way in: shards are written under hidden names, renamed when whole, and
the set exists from the moment when the manifest is replaced. Shards of an older set go last.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.codec import BLOCK_LENGTH, CODEC, encode_episode
from ivideogpt.data.episode import Episode

FORMAT = "ivideogpt-shards"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
MEMBER_SUFFIX = ".safetensors"
SHARD_BYTES = 256 * 2**20
SHARD_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar\Z")  # a plain file name
KEY_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,80}\Z")  # no dot (WebDataset splits there) and no slash


class ShardSetWriter:
    """Writes a shard set; use as a context manager.

    Leaving the block normally makes the set visible; leaving it by an exception removes what was begun and leaves an
    older set in the folder as it was. One writer a folder. With `resume`, shards that are full stay, hidden, when the
    process is killed, interrupted or out of disk, and the next writer with the same `resume` goes on behind them.

    Args:
        out: Folder of the set, created if absent.
        name: Prefix of the shard files.
        shard_bytes: A shard is closed when it holds at least this many bytes ...
        shard_episodes: ... or this many episodes.
        overwrite: Replace a set that is there already.
        command: The command line that makes the set; kept in the manifest.
        extra: Further JSON for the manifest (fidelity, options, ...).
        resume: What tells this conversion from others; None begins anew.

    Attributes:
        restored: Keys of the episodes that were found in shards of an earlier try, in order, with their frames.
        quarantine: Rows of JSON about what was left out; set before the block is left. They go into a file beside the
            manifest, which counts them.

    Raises:
        ValueError: There is a set already and `overwrite` is False, or a bad name.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        name: str = "episodes",
        shard_bytes: int = SHARD_BYTES,
        shard_episodes: int = 10_000,
        overwrite: bool = False,
        command: str = "",
        extra: dict[str, Any] | None = None,
        resume: str | None = None,
    ) -> None:
        self.out = Path(out)
        if not KEY_PATTERN.match(name):
            raise ValueError(f"shard name {name!r} may hold letters, digits, '-' and '_' only")
        if (self.out / MANIFEST).exists() and not overwrite:
            raise ValueError(f"{self.out} holds a shard set already; choose another folder or overwrite it")
        rows = self.out.glob(f".{name}-*.json.partial") if resume is not None else ()
        unfinished = {row.name[1:].replace(".json.partial", ".tar") for row in rows}  # may be renamed already
        if not overwrite and any(path.name not in unfinished for path in self.out.glob("*.tar")):
            raise ValueError(f"{self.out} holds tar files; choose another folder or overwrite it")
        self.name, self.shard_bytes, self.shard_episodes = name, shard_bytes, shard_episodes
        self.command = command
        self.extra = extra or {}
        self._shards: list[dict[str, Any]] = []
        self._members: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._stats = {"actions": _RunningStats(), "rewards": _RunningStats()}
        self._file: io.BufferedWriter | None = None
        self._tar: Any = None  # webdataset.TarWriter
        self._made_folder = False
        self.resume, self.restored = resume, dict[str, int]()
        self.quarantine: list[dict[str, str]] = []

    def __enter__(self) -> ShardSetWriter:
        self._made_folder = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        if self.resume is not None:
            self._restore()
        self._remove_partials(keep=len(self._shards))  # left by a process that was killed
        return self

    def _restore(self) -> None:
        """Takes over the full shards of an earlier try; what does not fit, or is not whole, is made again."""
        while True:
            path, row = self._partial(len(self._shards)), self._row(len(self._shards))
            published = self.out / f"{self.name}-{len(self._shards):06d}.tar"
            try:
                if published.exists() and not path.exists() and not (self.out / MANIFEST).exists():
                    os.replace(published, path)  # killed between the renaming and the manifest
                found = json.loads(row.read_text(encoding="utf-8"))
                whole = found["resume"] == self.resume and path.stat().st_size == found["size"]
                if not whole or file_sha256(path) != found["sha256"]:
                    return
                statistics = {name: _RunningStats.restored(state) for name, state in found["statistics"].items()}
            except (OSError, ValueError, KeyError, TypeError):
                return
            self._shards.append({name: found[name] for name in ("size", "sha256", "members")})
            self._stats |= statistics
            self.restored |= {member["key"]: member["frames"] for member in found["members"]}
            self._keys |= set(self.restored)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._abort(keep=self.resume is not None and issubclass(kind, (KeyboardInterrupt, OSError)))
            return
        try:
            with self._explained():
                self._commit()
        except BaseException as failure:
            self._abort(keep=self.resume is not None and isinstance(failure, (KeyboardInterrupt, OSError)))
            raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Says what a failed write (a full disk, say) means for the set."""
        try:
            yield
        except OSError as error:
            message = f"could not write the shard set ({error.strerror or error}); nothing was changed"
            raise OSError(error.errno, message, str(self.out)) from error

    def write(self, key: str, episode: Episode) -> None:
        """Encodes and appends one episode."""
        self.write_encoded(key, encode_episode(episode), summary(episode))

    def write_encoded(self, key: str, data: bytes, info: dict[str, Any]) -> None:
        """Appends an episode that was encoded elsewhere (`encode_episode`, `summary`), as parallel workers do."""
        if not KEY_PATTERN.match(key):
            raise ValueError(f"episode key {key!r} may hold letters, digits, '-' and '_' only, at most 81 of them")
        if key in self._keys:
            raise ValueError(f"two episodes have the key {key!r}")
        with self._explained():
            offset = self._append(key, data)
        self._keys.add(key)
        for name, stats in self._stats.items():
            stats.add(info.pop(name))
        self._members.append({"key": key, "offset": offset, "size": len(data), "crc32": zlib.crc32(data)} | info)
        if offset + len(data) >= self.shard_bytes or len(self._members) >= self.shard_episodes:
            with self._explained():
                self._close_shard()

    def _append(self, key: str, data: bytes) -> int:
        """Writes one member to the open shard and returns where its bytes begin."""
        import webdataset  # here, as it imports torch, which simulator processes do without

        if self._tar is None:
            self._file = open(self._partial(len(self._shards)), "wb")  # noqa: SIM115 - open across calls
            # mtime=0: equal input gives equal shards, and no extended header, which would double the reading time.
            self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        assert self._file is not None
        offset = self._tar.tarstream.offset + tarfile.BLOCKSIZE
        self._tar.write({"__key__": key, MEMBER_SUFFIX[1:]: data})
        return offset

    def _partial(self, index: int) -> Path:
        return self.out / f".{self.name}-{index:06d}.tar.partial"

    def _row(self, index: int) -> Path:
        return self.out / f".{self.name}-{index:06d}.json.partial"

    def _close_shard(self) -> None:
        assert self._tar is not None and self._file is not None
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = self._partial(len(self._shards))
        shard = {"size": path.stat().st_size, "sha256": file_sha256(path), "members": self._members}
        if self.resume is not None:
            statistics = {name: stats.state() for name, stats in self._stats.items()}
            write_json(self._row(len(self._shards)), shard | {"resume": self.resume, "statistics": statistics})
        self._shards.append(shard)
        self._members, self._tar, self._file = [], None, None

    def _commit(self) -> None:
        if self._tar is not None:
            self._close_shard()
        if not self._shards:
            raise ValueError(f"no episode was written to {self.out}; an empty set is refused")
        old = set(_listed_shards(self.out))
        names = [f"{self.name}-{index:06d}.tar" for index in range(len(self._shards))]
        if old & set(names):  # the old shards must stay until the manifest is replaced: put the content into the name
            content = hashlib.sha256("".join(shard["sha256"] for shard in self._shards).encode()).hexdigest()[:8]
            names = [f"{self.name}-{content}-{index:06d}.tar" for index in range(len(self._shards))]
        for index, (name, shard) in enumerate(zip(names, self._shards, strict=True)):
            os.replace(self._partial(index), self.out / name)
            self._shards[index] = {"name": name} | shard
        aside = self.out / f".{QUARANTINE}.partial"
        aside.write_text("".join(json.dumps(row) + "\n" for row in self.quarantine), encoding="utf-8")
        write_json(self.out / MANIFEST, self._manifest())
        if self.quarantine:
            os.replace(aside, self.out / QUARANTINE)
        else:
            (self.out / QUARANTINE).unlink(missing_ok=True)
        ours = re.compile(rf"{self.name}(-[0-9a-f]{{8}})?-\d{{6}}\.tar\Z")  # also what a killed writer left unlisted
        for path in self.out.glob("*.tar"):
            if path.name not in names and (path.name in old or ours.match(path.name)):
                path.unlink(missing_ok=True)
        self._remove_partials()

    def _abort(self, keep: bool = False) -> None:
        if self._tar is not None and self._file is not None:
            self._tar.tarstream.fileobj.fileobj = io.BytesIO()  # what is still buffered goes nowhere
            with contextlib.suppress(OSError):
                self._file.close()
            self._tar.close()
        listed = set(_listed_shards(self.out))
        for shard in self._shards:
            if "name" in shard and shard["name"] not in listed:
                (self.out / shard["name"]).unlink(missing_ok=True)
        self._remove_partials(keep=len(self._shards) if keep else 0)
        if self._made_folder:
            with contextlib.suppress(OSError):
                self.out.rmdir()

    def _remove_partials(self, keep: int = 0) -> None:
        """Removes what is hidden here but the first `keep` shards and their rows."""
        kept = {path for index in range(keep) for path in (self._partial(index), self._row(index))}
        for path in self.out.glob(".*.partial"):
            if path not in kept:
                path.unlink(missing_ok=True)

    def _manifest(self) -> dict[str, Any]:
        members = [member for shard in self._shards for member in shard["members"]]
        sources: dict[str, dict[str, Any]] = {}
        for member in members:
            entry = sources.setdefault(member["source"], {"episodes": 0, "frames": 0, "licence": member["licence"]})
            entry["episodes"] += 1
            entry["frames"] += member["frames"]
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "converter": f"ivideogpt {package_version()}",
            "command": self.command,
            "codec": {"name": CODEC, "block_length": BLOCK_LENGTH},
            "counts": {
                "shards": len(self._shards),
                "episodes": len(members),
                "frames": sum(member["frames"] for member in members),
            },
            "resolutions": sorted({tuple(member["resolution"]) for member in members}),
            "action_dims": sorted({member["action_dim"] or 0 for member in members}),
            "has_rewards": all(member["has_rewards"] for member in members),
            "sources": sources,
            "licences": sorted({member["licence"] for member in members}),
            "statistics": {name: stats.result() for name, stats in self._stats.items()},
            "quarantine": {"episodes": len(self.quarantine), "file": QUARANTINE if self.quarantine else None},
            "extra": self.extra,
            "shards": self._shards,
        }


def summary(episode: Episode) -> dict[str, Any]:
    """What the manifest keeps about an episode, with its actions and rewards for the statistics."""
    return {
        "frames": len(episode),
        "resolution": list(episode.resolution),
        "action_dim": episode.action_dim,
        "has_rewards": episode.rewards is not None,
        "fps": float(episode.fps),
        "source": episode.source,
        "licence": episode.licence,
        # The last action and the first reward are fillers where a recording has one fewer of each than frames.
        "actions": None if episode.actions is None else episode.actions[:-1],
        "rewards": None if episode.rewards is None else episode.rewards[1:, None],
    }


class _RunningStats:
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

    def state(self) -> dict[str, Any]:
        """All that was added up, as JSON that keeps every bit."""
        arrays = {name: getattr(self, name).tolist() for name in ("sums", "squares", "low", "high")}
        return {"count": self.count, "mixed": self.mixed} | arrays

    @classmethod
    def restored(cls, state: dict[str, Any]) -> _RunningStats:
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


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file in one step: aside, flushed to disk, renamed."""
    aside = path.with_name(f".{path.name}.partial")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _listed_shards(folder: Path) -> list[str]:
    """Names of the shards of the set that is in a folder now; none if there is no readable manifest."""
    try:
        names = [str(shard["name"]) for shard in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [name for name in names if SHARD_PATTERN.match(name)]  # never a path that leaves the folder
