"""Reads shard sets by episode number: the manifest says where each record lies, so nothing is scanned.

Faults are found in this order: the manifest (always an error, as nothing can be trusted without it), files that are
missing or not as long as the manifest says and records that run past their end (when the set is opened), files whose
hash differs (`verify`), records that do not decode (when they are read). The last three follow the policy:
`error` raises `ShardError`, `skip` leaves the episode out, counts it and warns.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ivideogpt.data.codec import CorruptRecordError, Record
from ivideogpt.data.episode import Episode
from ivideogpt.data.manifest import FORMAT, MANIFEST, SCHEMA_VERSION, SHARD_PATTERN, file_sha256
from ivideogpt.data.shards import KEY_PATTERN, MEMBER_SUFFIX

POLICIES = ("error", "skip")
EMBEDDED = "embedded"
_EMBEDDED_FOLDER = Path(__file__).parent.parent / "assets" / "data" / "metaworld"


class ShardError(ValueError):
    """A shard set that cannot be used as it is."""


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
        self._files: dict[Path, int] = {}
        self._owner = os.getpid()
        self.entries: list[dict[str, Any]] = []
        for shard in self.manifest["shards"]:
            self._add_shard(shard, verify)
        if not self.entries:
            raise ShardError(f"{self.folder}: no usable episode is left ({len(self.skipped)} were skipped)")

    def _add_shard(self, shard: dict[str, Any], verify: bool) -> None:
        path = self.folder / shard["name"]
        size = path.stat().st_size if path.is_file() else -1
        fault = ""
        if size < 0:
            fault = f"{path} is missing"
        elif size != shard["size"]:
            fault = f"{path} is truncated or changed: {size} bytes where the manifest says {shard['size']}"
        elif verify and file_sha256(path) != shard["sha256"]:
            fault = f"{path} is corrupt: its SHA-256 is not the manifest's"
        if fault and self.policy == "error":
            raise ShardError(fault)
        for member in shard["members"]:
            entry = member | {"path": path}
            if fault and not self._intact(entry, size):
                self._skip(entry, fault)
            else:
                self.entries.append(entry)

    def _intact(self, entry: dict[str, Any], size: int) -> bool:
        """Whether a record of a doubtful file holds exactly the bytes that were written."""
        if entry["offset"] + entry["size"] > size:
            return False
        return zlib.crc32(self._read(entry["path"], entry["offset"], entry["size"])) == entry["crc32"]

    def _skip(self, entry: dict[str, Any], reason: str) -> None:
        if entry["key"] not in self.skipped:
            self.skipped[entry["key"]] = reason
            warnings.warn(f"episode {entry['key']} skipped ({len(self.skipped)} so far): {reason}", stacklevel=3)

    def __len__(self) -> int:
        return len(self.entries)

    def key(self, index: int) -> str:
        """Key of an episode."""
        return self.entries[index]["key"]

    def record(self, index: int) -> Record | None:
        """Opens the record of an episode; None if it is bad and the policy is `skip`."""
        entry = self.entries[index]
        path, offset, size = entry["path"], entry["offset"], entry["size"]

        def read(begin: int, count: int) -> bytes:
            data = self._read(path, offset + begin, count) if begin + count <= size else b""
            if len(data) != count:
                raise CorruptRecordError(f"{begin}..{begin + count} lies beyond the record's {size} bytes")
            return data

        try:
            record = Record.open(read, size)
            shape = (len(record), record.header["shape"][1:3])
            if shape != (entry["frames"], entry["resolution"]):
                raise CorruptRecordError(
                    f"it holds {shape}, the manifest says {(entry['frames'], entry['resolution'])}"
                )
        except (CorruptRecordError, OSError) as error:
            self.bad(index, error)
            return None
        return record

    def bad(self, index: int, error: Exception) -> None:
        """Treats an episode as bad: raises ShardError under `error`, counts and warns under `skip`."""
        entry = self.entries[index]
        reason = f"{entry['path']}, episode {entry['key']}: {error}"
        if self.policy == "error":
            raise ShardError(reason) from error
        self._skip(entry, reason)

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
            self._files, self._owner = {}, os.getpid()
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        return os.pread(self._files[path], size, offset)

    def close(self) -> None:
        """Closes the files; they are opened again when needed."""
        if self._owner == os.getpid():
            for descriptor in self._files.values():
                os.close(descriptor)
        self._files = {}

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}


def load_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks a manifest.

    Raises:
        ShardError: Missing, unreadable, of another schema version, or contradicting itself.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "is empty" if not any(folder.iterdir()) else "has no manifest.json (was the writer interrupted?)"
        raise ShardError(f"{folder} {what}; make a shard set with `ivideogpt data pack` or `ivideogpt data collect`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["schema_version"] != SCHEMA_VERSION:
            version = f"{manifest['format']} version {manifest['schema_version']}"
            raise ShardError(f"{path}: {version}, this package reads {FORMAT} version {SCHEMA_VERSION}")
        keys: set[str] = set()
        found = {"shards": 0, "episodes": 0, "frames": 0}
        for shard in manifest["shards"]:
            if not SHARD_PATTERN.match(shard["name"]):
                raise ShardError(f"{path}: shard name {shard['name']!r} is not a plain file name ending in .tar")
            found["shards"] += 1
            for member in shard["members"]:
                if not KEY_PATTERN.match(member["key"]):
                    raise ShardError(f"{path}: episode key {member['key']!r} is not allowed")
                if member["key"] in keys:
                    raise ShardError(f"{path}: episode key {member['key']!r} appears twice")
                if not (member["offset"] >= 0 and 0 < member["size"] <= shard["size"] - member["offset"]):
                    raise ShardError(f"{path}: episode {member['key']!r} lies outside its shard")
                keys.add(member["key"])
                found["episodes"] += 1
                found["frames"] += member["frames"]
                _ = member["crc32"], member["resolution"], member["action_dim"], member["has_rewards"], member["fps"]
        if manifest["counts"] != found:
            raise ShardError(f"{path} disagrees with itself: counts {manifest['counts']}, but it lists {found}")
        if found["episodes"] == 0:
            raise ShardError(f"{path}: the set holds no episode")
    except ShardError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is not a readable manifest: {type(error).__name__}: {error}") from error
    return manifest


def verify_set(source: str | os.PathLike[str]) -> list[str]:
    """Checks everything about a set: hashes, tar structure, every record decoded. Returns the faults found.

    Raises:
        ShardError: There is no set, or its manifest is bad.
    """
    folder = resolve_source(source)
    faults = []
    for shard in load_manifest(folder)["shards"]:
        path = folder / shard["name"]
        if not path.is_file():
            faults.append(f"{path} is missing")
            continue
        if file_sha256(path) != shard["sha256"]:
            faults.append(f"{path}: SHA-256 differs from the manifest's")
        try:
            with tarfile.open(path) as tar:
                members = [(member.name, member.offset_data, member.size) for member in tar]
        except (tarfile.TarError, EOFError, OSError) as error:
            faults.append(f"{path}: not a whole tar file: {error}")
            continue
        listed = [(member["key"] + MEMBER_SUFFIX, member["offset"], member["size"]) for member in shard["members"]]
        if members != listed:
            faults.append(f"{path}: holds {len(members)} members that are not the {len(listed)} of the manifest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is skipped is reported below
        shards = ShardSet(folder, policy="skip")
        for index in range(len(shards)):
            shards.episode(index)
    return faults + sorted(set(shards.skipped.values()) - set(faults))
