"""Reads shard sets by episode number: the index says where each record lies, so nothing is scanned.

Behind a URL shards are fetched one by one when they are needed, and kept (`file_cache`).

Faults are found in this order: manifest and index (always an error, as nothing can be trusted without them), files that
are missing or not as long as the manifest says and records that run past their end (when the set is opened), files
whose hash differs (`verify`), records that do not decode (when they are read). The last three follow the policy:
`error` raises `ShardError`, `skip` leaves the episode out, counts it and warns.
"""

from __future__ import annotations

import os
import re
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.codec import CorruptRecordError, Record
from ivideogpt.data.episode import Episode
from ivideogpt.data.file_cache import FileCache, is_url
from ivideogpt.data.manifest import MANIFEST, file_sha256
from ivideogpt.data.opening import ShardError, load_index, load_manifest
from ivideogpt.data.remote import FolderShards, RemoteShards

__all__ = ["POLICIES", "ShardError", "ShardSet", "load_manifest", "open_source", "refuse_commands", "resolve_source"]

POLICIES = ("error", "skip")
EMBEDDED = "embedded"
_EMBEDDED_FOLDER = Path(__file__).parent.parent / "assets" / "data" / "metaworld"


def open_source(source: str | os.PathLike[str], cache: FileCache | None = None) -> FolderShards | RemoteShards:
    """Where the files of a set are; what is behind a URL is fetched into `cache` when it is needed.

    Raises:
        ShardError: See `resolve_source`, or a URL behind which there is no set.
    """
    text = os.fspath(source)
    if is_url(text):
        return RemoteShards(text, cache or FileCache())
    return FolderShards(resolve_source(text))


def resolve_source(source: str | os.PathLike[str]) -> Path:
    """The folder that a source names: a folder, its manifest.json, or `embedded[:train|:heldout]`.

    Raises:
        ShardError: A URL (one with a scheme such as `pipe:` would run a command), or nothing there.
    """
    text = os.fspath(source)
    if text == EMBEDDED or text.startswith(f"{EMBEDDED}:"):
        split = text.partition(":")[2] or "train"
        folder = _EMBEDDED_FOLDER / split
        if split not in ("train", "heldout") or not (folder / MANIFEST).exists():
            raise ShardError(f"no embedded set {text!r}; there are 'embedded:train' and 'embedded:heldout'")
        return folder
    refuse_commands(text)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", text):
        raise ShardError(f"{text!r} is a URL; name the folder itself")
    path = Path(text)
    folder = path.parent if path.name == MANIFEST else path
    if not folder.is_dir():
        raise ShardError(f"there is no folder {str(folder)!r} with a shard set")
    return folder


def _file_fault(path: Path, shard: dict[str, Any], verify: bool) -> tuple[str, int]:
    """What is wrong with a shard's file, and its size (-1: there is none)."""
    size = path.stat().st_size if path.is_file() else -1
    if size < 0:
        return f"{path} is missing", size
    if size != shard["size"]:
        return f"{path} is truncated or changed: {size} bytes where the manifest says {shard['size']}", size
    if verify and file_sha256(path) != shard["sha256"]:
        return f"{path} is corrupt: its SHA-256 is not the manifest's", size
    return "", size


def refuse_commands(url: str, allow: Sequence[str] = ()) -> None:
    """Raises ShardError if opening `url` with WebDataset would run a command, unless it is in `allow` letter by letter.

    WebDataset hands `pipe:` to a shell and opens s3, gs, http and others through command line programs.
    """
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]+):", url)
    if url in allow or scheme is None or scheme.group(1).lower() == "file":
        return
    raise ShardError(f"refused to open {url!r}: {scheme.group(1)}: runs a command; name it in `allow` if you trust it")


class ShardSet:
    """A shard set, opened for random access.

    Args:
        source: Folder, manifest or `embedded:...` (`resolve_source`).
        policy: What to do about bad records, `error` or `skip`.
        verify: Also hash every file now; where the hash differs, the records that are still intact stay. Files that are
            fetched are always hashed, when they come.
        cache: Where the files of a set behind a URL are kept.

    Raises:
        ShardError: No set there, a manifest that contradicts itself or the files, a bad record under `error`.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        policy: str = "error",
        verify: bool = False,
        cache: FileCache | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy {policy!r} is not one of {POLICIES}")
        self.files, self.policy = open_source(source, cache), policy
        self.folder, self.manifest = self.files.folder, self.files.manifest
        self.skipped: dict[str, str] = {}  # key of every episode left out, and why
        self.index = load_index(self.folder, self.manifest)
        self._open: OrderedDict[int, int] = OrderedDict()  # descriptors by the number of the shard
        self._owner = os.getpid()
        self._check_files(verify)

    def _check_files(self, verify: bool) -> None:
        """Leaves out what lies in missing, truncated or changed files and is not intact."""
        if isinstance(self.files, RemoteShards):  # checked when they come
            return
        ends = np.cumsum([shard["episodes"] for shard in self.manifest["shards"]])
        good = np.ones(len(self.index), bool)
        for number, (shard, end) in enumerate(zip(self.manifest["shards"], ends.tolist(), strict=True)):
            fault, size = _file_fault(self.files.path(number), shard, verify)
            if fault and self.policy == "error":
                raise ShardError(fault)
            for row in range(end - shard["episodes"], end) if fault else ():
                if not self._intact(row, size):
                    good[row] = False
                    self._skip(self.index.key(row), fault)
        if not good.all():
            self.index = self.index.take(np.flatnonzero(good))
        if not len(self.index):
            raise ShardError(f"{self.folder}: no usable episode is left ({len(self.skipped)} were skipped)")

    def _intact(self, row: int, size: int) -> bool:
        """Whether a record of a doubtful file holds exactly the bytes that were written."""
        number, offset, count = self._place(row)
        return offset + count <= size and zlib.crc32(self._read(number, offset, count)) == self.index["crc32"][row]

    def _skip(self, key: str, reason: str) -> None:
        if key not in self.skipped:
            self.skipped[key] = reason
            warnings.warn(f"episode {key} skipped ({len(self.skipped)} so far): {reason}", stacklevel=3)

    def __len__(self) -> int:
        return len(self.index)

    def key(self, index: int) -> str:
        """Key of an episode."""
        return self.index.key(index)

    def source(self, index: int) -> str:
        """Name of an episode's source."""
        return self.index.sources[self.index["source"][index]]

    def camera(self, index: int) -> str:
        """Name of an episode's camera; empty where the set does not say."""
        return self.index.cameras[self.index["camera"][index]]

    def recordings(self) -> list[int]:
        """Number of each episode's recording: cameras of one share it. Of a set with several all records are opened."""
        if len(np.unique(self.index["camera"])) < 2:
            return list(range(len(self)))
        known: dict[str, int] = {}
        numbers = []
        for index in range(len(self)):
            try:
                record = self.record(index)
                name = None if record is None else record.header["metadata"].get("recording")
            except ValueError:  # reading it will say why
                name = None
            numbers.append(known.setdefault(f"{self.key(index)}\0" if name is None else str(name), len(known)))
        return numbers

    def place(self, index: int) -> tuple[Path, int, int]:
        """File, offset and size of an episode's record; a file behind a URL is fetched."""
        number, offset, size = self._place(index)
        return self.files.path(number), offset, size

    def _place(self, index: int) -> tuple[int, int, int]:
        """Number of the shard, offset and size of an episode's record."""
        columns = self.index
        return int(columns["shard"][index]), int(columns["offset"][index]), int(columns["size"][index])

    def record(self, index: int) -> Record | None:
        """Opens the record of an episode; None if it is bad and the policy is `skip`."""
        number, offset, size = self._place(index)

        def read(begin: int, count: int) -> bytes:
            data = self._read(number, offset + begin, count) if begin + count <= size else b""
            if len(data) != count:
                raise CorruptRecordError(f"{begin}..{begin + count} lies beyond the record's {size} bytes")
            return data

        try:
            record = Record.open(read, size)
            shape = record.header["shape"][:3]
            expected = [int(self.index[column][index]) for column in ("frames", "height", "width")]
            if shape != expected:
                raise CorruptRecordError(f"it holds {shape} frames and pixels, the index says {expected}")
        except (CorruptRecordError, OSError) as error:
            self.bad(index, error)
            return None
        return record

    def bad(self, index: int, error: Exception) -> None:
        """Treats an episode as bad: raises ShardError under `error`, counts and warns under `skip`."""
        key = self.key(index)
        reason = f"{self.files.name(int(self.index['shard'][index]))}, episode {key}: {error}"
        if self.policy == "error":
            raise ShardError(reason) from error
        self._skip(key, reason)

    def episode(self, index: int) -> Episode | None:
        """Decodes a whole episode; None if it is bad and the policy is `skip`."""
        record = self.record(index)
        if record is None:
            return None
        try:
            return record.episode()
        except ValueError as error:
            self.bad(index, error)
            return None

    def _read(self, number: int, offset: int, size: int) -> bytes:
        if self._owner != os.getpid():  # after a fork: the descriptors stay valid, the cache must be this process's
            self._open, self._owner = OrderedDict(), os.getpid()
        if number in self._open:
            self._open.move_to_end(number)
        else:
            self._open[number] = self.files.open(number)
            if len(self._open) > self.files.open_files:
                os.close(self._open.popitem(last=False)[1])
        return os.pread(self._open[number], size, offset)

    def close(self) -> None:
        """Closes the files; they are opened again when needed."""
        if self._owner == os.getpid():
            for descriptor in self._open.values():
                os.close(descriptor)
        self._open = OrderedDict()

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}
