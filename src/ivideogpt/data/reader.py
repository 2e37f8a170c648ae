"""Reads shard sets by episode number: the index says where each record lies, so nothing is scanned.

Faults are found in this order: manifest and index (always an error, as nothing can be trusted without them), files that
are missing or not as long as the manifest says and records that run past their end (when the set is opened), files
whose hash differs (`verify`), records that do not decode (when they are read). The last three follow the policy:
`error` raises `ShardError`, `skip` leaves the episode out, counts it and warns.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.codec import CorruptRecordError, Record
from ivideogpt.data.episode import Episode
from ivideogpt.data.index import Index
from ivideogpt.data.manifest import MANIFEST, PixelError, SetSums, ShardRow, file_sha256
from ivideogpt.data.opening import ShardError, load_index, load_manifest
from ivideogpt.data.shards import MEMBER_SUFFIX, describe

__all__ = ["POLICIES", "ShardError", "ShardSet", "load_manifest", "refuse_commands", "resolve_source", "verify_set"]

POLICIES = ("error", "skip")
EMBEDDED = "embedded"
_OPEN_FILES = 256  # a process often has 1024 descriptors
_EMBEDDED_FOLDER = Path(__file__).parent.parent / "assets" / "data" / "metaworld"


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
        raise ShardError(f"{text!r} is a URL; a shard set is read from a local folder, so download it first")
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
        verify: Also hash every file now; where the hash differs, the records that are still intact stay.

    Raises:
        ShardError: No set there, a manifest that contradicts itself or the files, a bad record under `error`.
    """

    def __init__(self, source: str | os.PathLike[str], policy: str = "error", verify: bool = False) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy {policy!r} is not one of {POLICIES}")
        self.folder, self.policy = resolve_source(source), policy
        self.manifest = load_manifest(self.folder)
        self.skipped: dict[str, str] = {}  # key of every episode left out, and why
        self.index = load_index(self.folder, self.manifest)
        self._paths = [self.folder / shard["name"] for shard in self.manifest["shards"]]
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._owner = os.getpid()
        self._check_files(verify)

    def _check_files(self, verify: bool) -> None:
        """Leaves out what lies in missing, truncated or changed files and is not intact."""
        ends = np.cumsum([shard["episodes"] for shard in self.manifest["shards"]])
        good = np.ones(len(self.index), bool)
        for shard, path, end in zip(self.manifest["shards"], self._paths, ends.tolist(), strict=True):
            fault, size = _file_fault(path, shard, verify)
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
        path, offset, count = self.place(row)
        return offset + count <= size and zlib.crc32(self._read(path, offset, count)) == self.index["crc32"][row]

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

    def place(self, index: int) -> tuple[Path, int, int]:
        """File, offset and size of an episode's record."""
        columns = self.index
        return self._paths[columns["shard"][index]], int(columns["offset"][index]), int(columns["size"][index])

    def record(self, index: int) -> Record | None:
        """Opens the record of an episode; None if it is bad and the policy is `skip`."""
        path, offset, size = self.place(index)

        def read(begin: int, count: int) -> bytes:
            data = self._read(path, offset + begin, count) if begin + count <= size else b""
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
        reason = f"{self.place(index)[0]}, episode {key}: {error}"
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

    def _read(self, path: Path, offset: int, size: int) -> bytes:
        if self._owner != os.getpid():  # after a fork: the descriptors stay valid, the cache must be this process's
            self._files, self._owner = OrderedDict(), os.getpid()
        if path in self._files:
            self._files.move_to_end(path)
        else:
            self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return os.pread(self._files[path], size, offset)

    def close(self) -> None:
        """Closes the files; they are opened again when needed."""
        if self._owner == os.getpid():
            for descriptor in self._files.values():
                os.close(descriptor)
        self._files = OrderedDict()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}


def verify_set(source: str | os.PathLike[str]) -> list[str]:
    """Checks everything about a set: hashes, tar structure, every record, and what index and manifest say of them.

    Counts and statistics are added up again from the records.

    Returns:
        The faults found, each with where it is.

    Raises:
        ShardError: There is no set, or its manifest or index is bad.
    """
    folder = resolve_source(source)
    manifest = load_manifest(folder)
    index = load_index(folder, manifest)
    faults: list[str] = []
    end = 0
    for shard in manifest["shards"]:
        begin, end = end, end + shard["episodes"]
        rows = [(index.key(row) + MEMBER_SUFFIX, *_span(index, row)) for row in range(begin, end)]
        faults += _tar_faults(folder / shard["name"], shard, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is skipped is reported below
        shards = ShardSet(folder, policy="skip")
        sums = _recounted(shards)
    if not shards.skipped:  # else they differ for a reason that is told
        faults += _differences(shards, sums)
    return faults + sorted(set(shards.skipped.values()) - set(faults))


def _span(index: Index, row: int) -> tuple[int, int]:
    return int(index["offset"][row]), int(index["size"][row])


def _tar_faults(path: Path, shard: dict[str, Any], rows: list[tuple[str, int, int]]) -> list[str]:
    """What is wrong with a shard's file: its hash, and its members against name, offset and size of the index."""
    if not path.is_file():
        return [f"{path} is missing"]
    faults = [] if file_sha256(path) == shard["sha256"] else [f"{path}: SHA-256 differs from the manifest's"]
    try:
        with tarfile.open(path) as tar:
            members = [(member.name, member.offset_data, member.size) for member in tar]
    except (tarfile.TarError, EOFError, OSError) as error:
        return [*faults, f"{path}: not a whole tar file: {error}"]
    if members != rows:
        faults.append(f"{path}: holds {len(members)} members that are not the {len(rows)} of the index")
    return faults


def _recounted(shards: ShardSet) -> SetSums:
    """What a writer would have added up of the records that can be read."""
    sums, codec = SetSums(), shards.manifest.get("codec")
    for number, shard in enumerate(shards.manifest["shards"]):
        row = ShardRow(shard["size"], shard["sha256"], [], {}, "", PixelError())
        for index in np.flatnonzero(shards.index["shard"] == number).tolist():
            record = shards.record(index)
            if record is None:
                continue
            try:
                _, offset, size = shards.place(index)
                crc32 = zlib.crc32(record.read(0, size))
                if crc32 != shards.index["crc32"][index]:
                    raise CorruptRecordError("its CRC-32 is not the index's")
                if not isinstance(codec, dict) or record.codec.name != codec.get("name"):
                    raise CorruptRecordError(f"its codec is {record.codec.name!r}, the manifest says {codec}")
                info = describe(record.episode(), record.codec.name, record.header.get("squared_error", 0))
            except ValueError as error:
                shards.bad(index, error)
                continue
            row.add(shards.key(index), offset, size, crc32, info)
        sums.add(row)
    return sums


def _differences(shards: ShardSet, sums: SetSums) -> list[str]:
    """How index and manifest differ from what the records give."""
    stored, found, faults = shards.index, sums.index.build(), []
    for column in ("frames", "height", "width", "action_dim", "has_rewards", "fps"):
        faults += [
            f"{stored.key(row)}: {column} is {stored[column][row]} in the index, {found[column][row]} in the record"
            for row in np.flatnonzero(stored[column] != found[column])[:10].tolist()
        ]
    for column in ("source", "camera") if shards.manifest["schema_version"] > 1 else ("source",):
        for row in range(len(stored)):
            says, holds = stored.row(row)[column], found.row(row)[column]
            if says != holds:
                faults.append(f"{stored.key(row)}: {column} is {says!r} in the index, {holds!r} in the record")
    recounted = json.loads(json.dumps(sums.summary(len(shards.manifest["shards"]))))
    if shards.manifest["schema_version"] == 1:
        for entry in recounted["sources"].values():
            del entry["statistics"]
        recounted["codec"] = shards.manifest["codec"]
    for name, value in recounted.items():
        faults += [f"{shards.folder / MANIFEST}: {line}" for line in _unequal(name, shards.manifest.get(name), value)]
    return faults


def _unequal(name: str, says: Any, holds: Any) -> list[str]:
    """Where two JSON values differ by more than rounding."""
    if isinstance(says, dict) and isinstance(holds, dict) and says.keys() == holds.keys():
        return [line for key in says for line in _unequal(f"{name}.{key}", says[key], holds[key])]
    try:
        same = says == holds or np.allclose(np.asarray(says, float), np.asarray(holds, float), rtol=1e-5, atol=1e-7)
    except (TypeError, ValueError):  # no numbers, or not as many
        same = False
    return [] if same else [f"{name} is {says}, the records give {holds}"]
