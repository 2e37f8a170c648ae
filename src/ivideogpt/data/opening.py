"""Reads what a shard set says of itself, its manifest and its index, and believes none of it unchecked.

Sets of version 1 have a list of episodes in the manifest; it is made an index when the set is opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ivideogpt.data.index import INDEX_PATTERN, Index, IndexBuilder
from ivideogpt.data.manifest import FORMAT, MANIFEST, SCHEMA_VERSION, SHARD_PATTERN, file_sha256

VERSIONS = (1, SCHEMA_VERSION)


class ShardError(ValueError):
    """A shard set that cannot be used as it is."""


def load_manifest(folder: Path) -> dict[str, Any]:
    """Reads and checks a manifest; `load_index` checks what it says of single episodes.

    Raises:
        ShardError: Missing, unreadable, of another schema version, or contradicting itself.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "is empty" if not any(folder.iterdir()) else "has no manifest.json (was the writer interrupted?)"
        inside = sorted(f"'{found.parent}'" for found in folder.glob(f"*/{MANIFEST}"))
        if inside:
            raise ShardError(f"{folder} holds {len(inside)} sets and is none itself; name one: {', '.join(inside[:4])}")
        raise ShardError(f"{folder} {what}; make a shard set with `ivideogpt data pack` or `ivideogpt data collect`")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["schema_version"] not in VERSIONS:
            version = f"{manifest['format']} version {manifest['schema_version']}"
            raise ShardError(f"{path}: {version}, this package reads {FORMAT} versions 1 to {SCHEMA_VERSION}")
        names: set[str] = set()
        episodes = 0
        for shard in manifest["shards"]:
            if not SHARD_PATTERN.match(shard["name"]):
                raise ShardError(f"{path}: shard name {shard['name']!r} is not a plain file name ending in .tar")
            if shard["name"] in names:
                raise ShardError(f"{path}: shard {shard['name']!r} appears twice")
            names.add(shard["name"])
            if manifest["schema_version"] == 1:
                shard["episodes"] = len(shard["members"])
            _ = str(shard["sha256"])
            for count in (shard["size"], shard["episodes"]):
                if type(count) is not int or not 0 <= count < 2**63:
                    raise ShardError(f"{path}: shard {shard['name']!r} says {count!r} of its size or episodes")
            episodes += shard["episodes"]
        counts, found = manifest["counts"], {"shards": len(names), "episodes": episodes}
        if {name: counts[name] for name in found} != found or type(counts["frames"]) is not int:
            raise ShardError(f"{path} disagrees with itself: counts {counts}, but it lists {found}")
        if episodes == 0:
            raise ShardError(f"{path}: the set holds no episode")
    except ShardError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(f"{path} is not a readable manifest: {type(error).__name__}: {error}") from error
    return manifest


def load_index(folder: Path, manifest: dict[str, Any]) -> Index:
    """The index of a set, checked; of a set of version 1 it takes the lists of episodes out of the manifest.

    Raises:
        ShardError: Missing, changed, or contradicting the manifest or itself.
    """
    if manifest["schema_version"] == 1:
        path = folder / MANIFEST
        try:
            builder = IndexBuilder()
            for shard in manifest["shards"]:
                builder.add(shard.pop("members"))
            index = builder.build()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ShardError(f"{path} is not a readable manifest: {type(error).__name__}: {error}") from error
    else:
        path, index = _mapped(folder, manifest)
    try:
        index.check(manifest["shards"])
        frames = int(index["frames"].sum(dtype="int64"))
        if frames != manifest["counts"]["frames"]:
            raise ValueError(f"counts {manifest['counts']}, but it lists {frames} frames")
    except ValueError as error:
        raise ShardError(f"{path} disagrees with itself: {error}") from error
    return index


def _mapped(folder: Path, manifest: dict[str, Any]) -> tuple[Path, Index]:
    """The file of an index, and what it holds."""
    try:
        says = manifest["index"]
        name, size, sha256 = says["name"], says["size"], says["sha256"]
        if not INDEX_PATTERN.match(name):
            raise ShardError(f"{folder / MANIFEST}: index name {name!r} is not index-(16 digits).safetensors")
    except (KeyError, TypeError) as error:
        raise ShardError(f"{folder / MANIFEST} is not a readable manifest: {type(error).__name__}: {error}") from error
    path = folder / name
    try:
        found = path.stat().st_size if path.is_file() else -1
        if found < 0:
            raise ShardError(f"{path} is missing; without its index a set cannot be read")
        if found != size:
            raise ShardError(f"{path} is truncated or changed: {found} bytes where the manifest says {size}")
        if file_sha256(path) != sha256:
            raise ShardError(f"{path} is corrupt: its SHA-256 is not the manifest's")
        return path, Index.open(path)
    except ShardError:
        raise
    except (OSError, ValueError) as error:
        raise ShardError(f"{path} is not a readable index: {error}") from error
