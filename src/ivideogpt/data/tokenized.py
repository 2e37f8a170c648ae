"""Token sets on disk: clips as token ids, written in safetensors shards that a kill cannot break, read by clip number.

A set is a folder: `tokens-000000.safetensors`, `tokens-000001.safetensors`, ... and `manifest.json`. A shard of N clips
holds these tensors, one row a clip (L tokens, T frames, A the action width, W the longest key):

    tokens   uint16 (N, L)           key      uint8 (N, W)   the episode's key in ASCII, zeros behind it
    actions  float32 (N, T, A)       source   uint16 (N,)    number in the manifest's `sources`
    rewards  float32 (N, T)          episode  int32 (N,)     number of the episode in that source
    crc32    uint32 (N,)             start    int32 (N,)     first frame of the clip, a goal frame not counted
                                     draw     uint16 (N,)    number of the augmentation draw

Actions and rewards are left out where the recordings have none; crc32 is over the bytes of the clip's row of tokens,
actions and rewards, one after another. Every shard carries the settings that it was made with, so that a set is never
mixed. Shards are written aside and renamed when whole; the set exists when the manifest does.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivideogpt.data.manifest import MANIFEST, file_sha256
from ivideogpt.data.reader import ShardError
from ivideogpt.data.safetensors_header import Place, read_header

FORMAT = "ivideogpt-tokens"
SCHEMA_VERSION = 1
SHARD_PATTERN = re.compile(r"tokens-\d{6}\.safetensors\Z")
MAX_VOCAB = 2**16
SETTINGS = (
    *("tokenizer_hash", "context_length", "segment_length", "resolution", "stride", "target_rate", "goal"),
    *("clips_per_episode", "every", "draws", "seed", "augmentation", "dtype", "shard_clips", "sources"),
)
"""What decides the content of a set; it stands in the manifest and in every shard."""

_CONTENT = ("tokens", "actions", "rewards")  # in the order in which crc32 takes them
_ABOUT = ("crc32", "key", "source", "episode", "start", "draw")
_OPEN_SHARDS = 256  # each mapped file holds a descriptor, of which a process often has 1024


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"tokens-{number:06d}.safetensors"


def checksums(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """uint32 (N,): CRC-32 over the rows of tokens, actions and rewards."""
    rows = [np.ascontiguousarray(arrays[name]) for name in _CONTENT if name in arrays]
    return np.array([_checksum([array[i] for array in rows]) for i in range(len(rows[0]))], np.uint32)


def _checksum(rows: list[np.ndarray]) -> int:
    crc = 0
    for row in rows:
        crc = zlib.crc32(row.tobytes(), crc)
    return crc


def read_shard_header(path: Path) -> tuple[dict[str, Any], dict[str, Place], int]:
    """What a shard says of itself (settings, shard, skipped), its tensors by name, and its length.

    Raises:
        ShardError: It is no whole safetensors file, or not one of ours.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            metadata, tensors = read_header(lambda offset, count: os.pread(file.fileno(), count, offset), size)
        about = json.loads(metadata[FORMAT])
        _ = about["settings"], about["shard"], about["skipped"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is no whole shard of tokens: {type(error).__name__}: {error}") from error
    return about, tensors, size


def load_token_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks the manifest of a token set.

    Raises:
        ShardError: Missing, unreadable, of another format or version, or contradicting itself.
    """
    path = folder / MANIFEST
    if not path.is_file():
        begun = " (it was begun: give `ivideogpt data tokenize` again)" if any(folder.glob("tokens-*")) else ""
        raise ShardError(f"{folder} holds no tokens{begun}; make a set with `ivideogpt data tokenize`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ShardError(
                f"{folder} is no token set but {manifest['format']!r}; make one of it with `ivideogpt data tokenize`"
            )
        if manifest["schema_version"] != SCHEMA_VERSION:
            raise ShardError(f"{path}: version {manifest['schema_version']}, this package reads {SCHEMA_VERSION}")
        for shard in manifest["shards"]:
            if not SHARD_PATTERN.match(shard["name"]):
                raise ShardError(f"{path}: shard name {shard['name']!r} is not of the kind {shard_name(0)}")
            _ = int(shard["clips"]), int(shard["size"]), shard["sha256"]
        if manifest["counts"]["clips"] != sum(shard["clips"] for shard in manifest["shards"]) or not manifest["shards"]:
            raise ShardError(f"{path} disagrees with itself about the number of clips")
        _ = [manifest[name] for name in (*SETTINGS, "action_dim", "has_rewards", "sequence_length", "vocab_size")]
    except ShardError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{path} is not a readable manifest: {type(error).__name__}: {error}") from error
    return manifest


def holds_tokens(source: str | os.PathLike[str]) -> bool:
    """Whether a folder is a token set (and not, say, a shard set of episodes)."""
    try:
        return json.loads((Path(source) / MANIFEST).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


class TokenSet:
    """A token set, with random access by clip number; shards are mapped into memory when they are needed.

    `len(s)` is the number of clips, `s[n]` clip n as a dict: `tokens` int64 (L,), `actions` float32 (T, A) and
    `rewards` float32 (T,) where there are any, `key`, and the numbers `source`, `episode`, `start`, `draw`.

    Args:
        folder: Of the set.
        verify: Hash every shard.

    Raises:
        ShardError: There is no set, or a shard is missing, truncated or (with `verify`) changed.
    """

    def __init__(self, folder: str | os.PathLike[str], verify: bool = False) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise ShardError(f"there is no folder {self.folder}; make a token set with `ivideogpt data tokenize`")
        self.manifest = load_token_manifest(self.folder)
        faults = shard_faults(self.folder, self.manifest, hashes=verify)
        if faults:
            raise ShardError(faults[0])
        self._ends = np.cumsum([shard["clips"] for shard in self.manifest["shards"]])
        self._shards: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> dict[str, Any]:
        if not 0 <= number < len(self):
            raise IndexError(f"clip {number} of {len(self)}")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        row = number - (int(self._ends[shard - 1]) if shard else 0)
        arrays = self.shard(shard)
        content = [arrays[name][row] for name in _CONTENT if name in arrays]
        if _checksum(content) != arrays["crc32"][row]:
            raise ShardError(f"{self.path(shard)}: clip {number} is damaged (CRC-32); tokenize the set again")
        clip: dict[str, Any] = {"tokens": torch.from_numpy(arrays["tokens"][row].astype(np.int64))}
        for name in ("actions", "rewards"):
            if name in arrays:
                clip[name] = torch.from_numpy(arrays[name][row].astype(np.float32))
        clip["key"] = arrays["key"][row].tobytes().rstrip(b"\0").decode("ascii", "replace")
        return clip | {name: int(arrays[name][row]) for name in ("source", "episode", "start", "draw")}

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / self.manifest["shards"][shard]["name"]

    def shard(self, shard: int) -> dict[str, np.ndarray]:
        """The arrays of a shard, mapped and not copied."""
        if shard in self._shards:
            self._shards.move_to_end(shard)
            return self._shards[shard]
        path = self.path(shard)
        _, tensors, _ = read_shard_header(path)
        clips, length = self.manifest["shards"][shard]["clips"], self.manifest["sequence_length"]
        frames, action_dim = self.manifest["segment_length"], self.manifest["action_dim"]
        wanted: dict[str, tuple[int, ...]] = {"tokens": (clips, length)}
        wanted |= {} if action_dim is None else {"actions": (clips, frames, action_dim)}
        wanted |= {"rewards": (clips, frames)} if self.manifest["has_rewards"] else {}
        found = {name: tensor[1] for name, tensor in tensors.items() if name in _CONTENT}
        missing = [name for name in _ABOUT if name not in tensors or tensors[name][1][:1] != (clips,)]
        if found != wanted or missing:
            raise ShardError(f"{path} holds {found}, the manifest says {wanted}; also wrong: {missing or 'nothing'}")
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays = {name: tensor.array(memoryview(mapped)[tensor.begin : tensor.end]) for name, tensor in tensors.items()}
        self._shards[shard] = arrays
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": OrderedDict()}


def shard_faults(folder: Path, manifest: Mapping[str, Any], hashes: bool) -> list[str]:
    """What is wrong with the files of a token set: missing, of another size, or (with `hashes`) changed."""
    faults = []
    for shard in manifest["shards"]:
        path = folder / shard["name"]
        size = path.stat().st_size if path.is_file() else -1
        if size < 0:
            faults.append(f"{path} is missing")
        elif size != shard["size"]:
            faults.append(f"{path} is truncated or changed: {size} bytes where the manifest says {shard['size']}")
        elif hashes and file_sha256(path) != shard["sha256"]:
            faults.append(f"{path} is corrupt: its SHA-256 is not the manifest's")
    return faults


def verify_token_set(folder: str | os.PathLike[str]) -> list[str]:
    """Checks hashes and every clip of a token set; returns the faults found.

    Raises:
        ShardError: There is no set, or its manifest is bad.
    """
    folder = Path(folder)
    manifest = load_token_manifest(folder)
    faults = shard_faults(folder, manifest, hashes=True)
    if faults:
        return faults
    tokens, first = TokenSet(folder), 0
    for number, shard in enumerate(manifest["shards"]):
        try:
            arrays = tokens.shard(number)
            bad = np.flatnonzero(checksums(arrays) != arrays["crc32"])
            faults += [f"{tokens.path(number)}: clip {first + row} is damaged (CRC-32)" for row in bad]
            if len(arrays["tokens"]) and arrays["tokens"].max() >= manifest["vocab_size"]:
                faults.append(f"{tokens.path(number)}: ids beyond the vocabulary of {manifest['vocab_size']}")
        except ShardError as error:
            faults.append(str(error))
        first += shard["clips"]
    return faults


def collate_tokens(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks clips: tokens int64 (B, L), actions (B, T, A), rewards (B, T), clip (B,) in training, key list of B."""
    batch: dict[str, Any] = {name: torch.stack([c[name] for c in clips]) for name in _CONTENT if name in clips[0]}
    numbers: dict[str, Tensor] = {
        name: torch.tensor([clip[name] for clip in clips]) for name in ("clip",) if name in clips[0]
    }
    return batch | numbers | {"key": [clip["key"] for clip in clips]}
