"""The index of a shard set: where each episode lies and what it is, as columns of numbers in one file.

A set of a million episodes is opened by mapping its index into memory, which all processes that read it share. The file
is safetensors; its name holds its hash, so that an older index stays until the manifest names the new one:

    shard         int32 (N,)    number of the shard in the manifest; rows lie in the order of the shards
    offset, size  int64 (N,)    bytes of the record in the shard
    crc32         uint32 (N,)   of the record
    frames        int32 (N,)
    height, width int32 (N,)    pixels
    action_dim    int32 (N,)    0: no actions
    has_rewards   uint8 (N,)
    fps           float64 (N,)
    source, camera int32 (N,)   number in the lists of names of the metadata
    keys          uint8 (K,)    all keys one after another, in ASCII
    key_ends      int64 (N,)    where each of them ends
    __metadata__  {"ivideogpt-index": JSON}   sources and cameras: lists of names
"""

from __future__ import annotations

import json
import mmap
import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ivideogpt.data.safetensors_header import read_header

NAME = "ivideogpt-index"
INDEX_PATTERN = re.compile(r"index-[0-9a-f]{16}\.safetensors\Z")  # a plain file name
KEY_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,80}\Z")  # no dot (WebDataset splits there) and no slash
_KEYS, _LONGEST_KEY = ("keys", "key_ends"), 81
_KEY_BYTES = np.zeros(256, bool)
_KEY_BYTES[list(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")] = True
_COLUMNS: dict[str, tuple[str, str]] = {  # array's type code, and the type in the file
    "shard": ("i", "<i4"), "offset": ("q", "<i8"), "size": ("q", "<i8"), "crc32": ("I", "<u4"), "frames": ("i", "<i4"),
    "height": ("i", "<i4"), "width": ("i", "<i4"), "action_dim": ("i", "<i4"), "has_rewards": ("B", "u1"),
    "fps": ("d", "<f8"), "source": ("i", "<i4"), "camera": ("i", "<i4"), "key_ends": ("q", "<i8"),
}  # fmt: skip


class Index:
    """The columns of an index: `index["frames"]` is int32 (N,), `index.key(3)` a key, `len(index)` N.

    Args:
        columns: The columns and `keys`, as above.
        sources: Names of the sources.
        cameras: Names of the cameras.
        path: The file that they were mapped from, if any: another process maps it again.
    """

    def __init__(
        self, columns: dict[str, np.ndarray], sources: Sequence[str], cameras: Sequence[str], path: Path | None = None
    ) -> None:
        self._columns, self.sources, self.cameras, self._path = columns, list(sources), list(cameras), path

    def __len__(self) -> int:
        return len(self._columns["shard"])

    def __getitem__(self, column: str) -> np.ndarray:
        return self._columns[column]

    def key(self, row: int) -> str:
        """Key of an episode."""
        ends = self._columns["key_ends"]
        row = row if row >= 0 else len(self) + row
        return self._columns["keys"][int(ends[row - 1]) if row else 0 : int(ends[row])].tobytes().decode("ascii")

    def value(self, column: str, row: int) -> Any:
        """A number of an episode as Python has it: `action_dim` is None without actions, `has_rewards` a bool."""
        value = self._columns[column][row].item()
        return bool(value) if column == "has_rewards" else value or None if column == "action_dim" else value

    def row(self, row: int) -> dict[str, Any]:
        """All of an episode: the columns as numbers, `key`, and the names of source and camera."""
        values = {name: column[row].item() for name, column in self._columns.items() if name not in _KEYS}
        names = {"source": self.sources[values["source"]], "camera": self.cameras[values["camera"]]}
        return values | names | {"key": self.key(row)}

    def take(self, rows: np.ndarray) -> Index:
        """The index of some of the episodes, by their numbers."""
        columns = {name: column[rows] for name, column in self._columns.items() if name not in _KEYS}
        chosen = [self.key(int(row)).encode() for row in rows]
        columns["keys"] = np.frombuffer(b"".join(chosen), np.uint8)
        columns["key_ends"] = np.cumsum([len(key) for key in chosen], dtype=np.int64)
        return Index(columns, self.sources, self.cameras)

    @classmethod
    def open(cls, path: Path) -> Index:
        """Maps a file into memory; `check` it before it is used.

        Raises:
            OSError: It cannot be read.
            ValueError: It is no index.
        """
        with open(path, "rb") as file:
            size = path.stat().st_size
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
        metadata, tensors = read_header(lambda offset, count: bytes(data[offset : offset + count]), size)
        try:
            names = json.loads(metadata[NAME])
            wanted = {name: kind for name, (_, kind) in _COLUMNS.items()} | {"keys": "u1"}
            found = {name: tensor.dtype.str for name, tensor in tensors.items()}
            if found != {name: np.dtype(kind).str for name, kind in wanted.items()}:
                raise ValueError(f"columns {found}")
            rows = tensors["shard"].shape
            for name, tensor in tensors.items():
                if len(tensor.shape) != 1 or (name != "keys" and tensor.shape != rows):
                    raise ValueError(f"column {name!r} of shape {tensor.shape}, {rows} is wanted")
            for name in ("sources", "cameras"):
                if not isinstance(names[name], list) or not all(isinstance(text, str) for text in names[name]):
                    raise ValueError(f"{name} is no list of names")
            columns = {name: tensor.array(data[tensor.begin : tensor.end]) for name, tensor in tensors.items()}
            return cls(columns, names["sources"], names["cameras"], path)
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not an index of episodes: {type(error).__name__}: {error}") from error

    def __reduce__(self) -> tuple[Any, ...]:
        if self._path is not None:
            return Index.open, (self._path,)
        return Index, (self._columns, self.sources, self.cameras)

    def write(self, path: Path) -> None:
        """Writes the file; equal episodes give equal bytes."""
        names = json.dumps({"sources": self.sources, "cameras": self.cameras})
        path.touch()
        mode = path.stat().st_mode
        save_file({name: np.ascontiguousarray(column) for name, column in self._columns.items()}, path, {NAME: names})
        path.chmod(mode)  # safetensors lets nobody but the owner read

    def check(self, shards: Sequence[dict[str, Any]]) -> None:
        """Checks every row against the shards, each with its `size` and, in the index's order, `episodes`.

        Raises:
            ValueError: What is wrong, with the key of the first episode that it is wrong with.
        """
        columns, numbers = self._columns, np.arange(len(shards))
        counts = [shard["episodes"] for shard in shards]
        if len(self) != sum(counts) or not np.array_equal(columns["shard"], np.repeat(numbers, counts)):
            raise ValueError(f"it lists {len(self)} episodes that are not the {sum(counts)} of the shards")
        self._check_keys()
        sizes = np.array([shard["size"] for shard in shards], np.int64)[columns["shard"]]
        offset, size, fps = columns["offset"], columns["size"], columns["fps"]
        for what, bad in (
            ("lies outside its shard", (offset < 0) | (size <= 0) | (size > sizes - offset)),
            ("has no frames", columns["frames"] <= 0),
            ("has no pixels", (columns["height"] <= 0) | (columns["width"] <= 0)),
            ("has actions of a width below 0", columns["action_dim"] < 0),
            ("has a frame rate that is no positive number", ~(np.isfinite(fps) & (fps > 0))),
            ("has a source without a name", _outside(columns["source"], len(self.sources))),
            ("has a camera without a name", _outside(columns["camera"], len(self.cameras))),
        ):
            if bad.any():
                raise ValueError(f"episode {self.key(int(bad.argmax()))!r} {what}")

    def _check_keys(self) -> None:
        keys, ends = self._columns["keys"], self._columns["key_ends"]
        if len(self) == 0:
            return
        lengths = np.diff(ends, prepend=0)
        if ends[0] < 0 or (lengths < 0).any() or ends[-1] != len(keys):
            raise ValueError("the keys do not fit their lengths")
        bad = (lengths == 0) | (lengths > _LONGEST_KEY)
        starts = ends - lengths
        bad[~bad] = keys[starts[~bad]] == ord("-")
        wrong = np.flatnonzero(~_KEY_BYTES[keys])
        if len(wrong):
            bad[np.searchsorted(ends, wrong[0], side="right")] = True
        if bad.any():
            row = int(bad.argmax())
            text = keys[starts[row] : ends[row]][:100].tobytes().decode("ascii", "backslashreplace")
            raise ValueError(f"episode key {text!r} is not allowed")
        twice = self.repeated_key()
        if twice is not None:
            raise ValueError(f"episode key {twice!r} appears twice")

    def repeated_key(self) -> str | None:
        """A key that two episodes have; None if all differ."""
        ends = self._columns["key_ends"]
        lengths = np.diff(ends, prepend=0)
        padded = np.zeros((len(self), int(lengths.max(initial=1))), np.uint8)
        padded[np.arange(padded.shape[1]) < lengths[:, None]] = self._columns["keys"]
        keys = np.sort(padded.view(f"S{padded.shape[1]}")[:, 0])  # a set of them would take ten times the memory
        twice = np.flatnonzero(keys[1:] == keys[:-1])
        return keys[twice[0]].decode("ascii") if len(twice) else None


def _outside(column: np.ndarray, count: int) -> np.ndarray:
    return (column < 0) | (column >= count)


class IndexBuilder:
    """Adds up the rows of an index, shard by shard."""

    def __init__(self) -> None:
        self._columns = {name: array(code) for name, (code, _) in _COLUMNS.items()}
        self._keys = bytearray()
        self._names: dict[str, dict[str, int]] = {"source": {}, "camera": {}}
        self._shards = 0

    def add(self, members: Iterable[dict[str, Any]]) -> None:
        """Adds the episodes of the next shard, as `ShardRow.members` or a manifest of version 1 has them.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: They have not what an index needs.
        """
        columns = self._columns
        for member in members:
            self._keys += member["key"].encode("ascii", "backslashreplace")
            height, width = member["resolution"]
            values = {name: member[name] for name in ("offset", "size", "crc32", "frames", "fps")}
            values |= {"shard": self._shards, "key_ends": len(self._keys), "height": height, "width": width}
            values |= {"action_dim": member["action_dim"] or 0, "has_rewards": bool(member["has_rewards"])}
            for name, known in self._names.items():
                values[name] = known.setdefault(str(member.get(name, "")), len(known))
            for name, column in columns.items():
                column.append(values[name])
        self._shards += 1

    def build(self) -> Index:
        """The index of all that was added, without a copy; adds nothing after it."""
        columns = {name: np.frombuffer(column, _COLUMNS[name][1]) for name, column in self._columns.items()}
        columns["keys"] = np.frombuffer(self._keys, np.uint8)
        return Index(columns, list(self._names["source"]), list(self._names["camera"]))
