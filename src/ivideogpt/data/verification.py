"""Checks a shard set: files against the manifest, records against the index, sums against what is added up again."""

from __future__ import annotations

import json
import os
import tarfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.codec import CorruptRecordError
from ivideogpt.data.file_cache import FileCache, RemoteError
from ivideogpt.data.index import Index
from ivideogpt.data.manifest import MANIFEST, PixelError, SetSums, ShardRow, file_sha256
from ivideogpt.data.opening import load_index
from ivideogpt.data.reader import ShardSet, open_source
from ivideogpt.data.shards import MEMBER_SUFFIX, describe


def verify_set(source: str | os.PathLike[str], cache: FileCache | None = None) -> list[str]:
    """Checks everything about a set: hashes, tar structure, every record, and what index and manifest say of them.

    Counts and statistics are added up again from the records.

    Args:
        source: As for `ShardSet`.
        cache: As for `ShardSet`.

    Returns:
        The faults found, each with where it is.

    Raises:
        ShardError: There is no set, or its manifest or index is bad.
    """
    files = open_source(source, cache)
    index = load_index(files.folder, files.manifest)
    faults: list[str] = []
    end = 0
    for number, shard in enumerate(files.manifest["shards"]):
        begin, end = end, end + shard["episodes"]
        rows = [(index.key(row) + MEMBER_SUFFIX, *_span(index, row)) for row in range(begin, end)]
        try:
            path = files.path(number)
        except RemoteError as error:
            faults.append(str(error))
            continue
        faults += _tar_faults(path, shard, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is skipped is reported below
        shards = ShardSet(source, policy="skip", cache=cache)
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
                offset, size = _span(shards.index, index)
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
