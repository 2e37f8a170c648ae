"""Writes token sets shard by shard: a kill loses the shard that was begun, and several processes may share the work.

Which clips a shard holds is known before anything is computed, so whoever finds a shard missing can make it, and the
set is complete when all are there. A folder with shards of other settings is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.manifest import MANIFEST, file_sha256, package_version, write_json
from ivideogpt.data.reader import ShardError
from ivideogpt.data.tokenized import (
    FORMAT,
    MAX_VOCAB,
    SCHEMA_VERSION,
    SETTINGS,
    checksums,
    load_token_manifest,
    read_shard_header,
    shard_name,
)


class TokenSetWriter:
    """Writes the shards that are missing in a folder, and the manifest when none is.

    Args:
        out: Folder of the set, created if absent.
        settings: A value for each of `tokenized.SETTINGS`.
        clips: Clips of the whole set, the bad ones among them counted.
        vocab_size: Number of token ids.

    Raises:
        ValueError: The folder holds something else, or tokens of other settings (naming the first that differ).
    """

    def __init__(self, out: str | os.PathLike[str], settings: Mapping[str, Any], clips: int, vocab_size: int) -> None:
        assert set(settings) == set(SETTINGS)
        if vocab_size > MAX_VOCAB:
            raise ValueError(f"{vocab_size} token ids do not fit into 16 bits")
        self.out, self.clips, self.vocab_size = Path(out).expanduser(), clips, vocab_size
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out} is a file; give a folder for the tokens")
        self._check_folder()
        self.out.mkdir(parents=True, exist_ok=True)
        self._wrote = False

    @property
    def num_shards(self) -> int:
        """Shards of the whole set."""
        return -(-self.clips // self.settings["shard_clips"])

    def clips_of(self, shard: int) -> range:
        """Numbers of the clips that a shard is made of."""
        first = shard * self.settings["shard_clips"]
        return range(first, min(first + self.settings["shard_clips"], self.clips))

    def missing(self, part: int = 1, parts: int = 1) -> list[int]:
        """Shards of part `part` of 1..`parts` that are still to be made."""
        if not 1 <= part <= parts:
            raise ValueError(f"part {part}/{parts}: the parts are 1/{parts} to {parts}/{parts}")
        return [n for n in range(part - 1, self.num_shards, parts) if not (self.out / shard_name(n)).is_file()]

    def write(self, shard: int, arrays: Mapping[str, np.ndarray], skipped: Sequence[str] = ()) -> None:
        """Writes one shard: aside, flushed to the disk, renamed.

        Args:
            shard: Its number.
            arrays: What `tokenized` lists, less crc32, with `key` a list of str.
            skipped: Keys of the bad episodes whose clips are left out.

        Raises:
            OSError: It could not be written; the shards before it are kept.
        """
        from safetensors.numpy import save

        keys = np.array([key.encode("ascii") for key in arrays["key"]] or [b"\0"], dtype=np.bytes_)
        values = {name: np.ascontiguousarray(array) for name, array in arrays.items() if name != "key"}
        count = len(values["tokens"])
        values["key"] = keys.view(np.uint8).reshape(len(keys), -1)[:count]
        values["crc32"] = checksums(values)
        about = {"schema_version": SCHEMA_VERSION, "shard": shard, "skipped": list(skipped), "settings": self.settings}
        # One entry alone: safetensors writes several in an order that differs from run to run.
        data = save(values, metadata={FORMAT: json.dumps(about)})
        path = self.out / shard_name(shard)
        aside = self.out / f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial"
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            self._wrote = True
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            what = (
                f"could not write the shard ({error.strerror or error}); whole ones are kept, the same command goes on"
            )
            raise OSError(error.errno, what, str(path)) from error

    def commit(self, command: str = "", model: str = "", sources: Sequence[str] = ()) -> bool:
        """Writes the manifest if all shards are there; False while parts are missing.

        Args:
            command: The command line.
            model: What the tokenizer was named by.
            sources: What the shard sets were named by.

        Raises:
            ValueError: Every clip was bad.
        """
        if self.missing():
            return False
        if (self.out / MANIFEST).is_file() and not self._wrote:
            return True
        shards: list[dict[str, Any]] = []
        skipped, first = set[str](), dict[str, Any]()
        for number in range(self.num_shards):
            path = self.out / shard_name(number)
            about, tensors, size = read_shard_header(path)
            shards.append(
                {"name": path.name, "clips": tensors["tokens"][1][0], "size": size, "sha256": file_sha256(path)}
            )
            skipped |= set(about["skipped"])
            first = tensors if number == 0 else first
        clips, length = sum(shard["clips"] for shard in shards), first["tokens"][1][1]
        if clips == 0:
            raise ValueError(f"{self.out}: every episode was bad, there is nothing to train on")
        manifest = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "converter": f"ivideogpt {package_version()}",
            "command": command,
            "model": model,
            "shard_sets": list(sources),
            **self.settings,
            "vocab_size": self.vocab_size,
            "sequence_length": length,
            "action_dim": first["actions"][1][2] if "actions" in first else None,
            "has_rewards": "rewards" in first,
            "counts": {
                "shards": len(shards),
                "clips": clips,
                "tokens": clips * length,
                "bytes": sum(shard["size"] for shard in shards),
            },
            "skipped": sorted(skipped),
            "shards": shards,
        }
        write_json(self.out / MANIFEST, manifest)
        for path in self.out.glob(".tokens-*.partial"):  # left by processes that were killed
            path.unlink(missing_ok=True)
        return True

    def _check_folder(self) -> None:
        """Refuses a folder that holds anything that is not of this set."""
        advice = "choose another folder or delete this one"
        if (self.out / MANIFEST).exists():
            try:
                there = load_token_manifest(self.out)
            except ShardError as error:
                raise ValueError(f"{error}; {advice}") from error
            self._check_settings(there, advice)
            return
        if self.out.is_dir() and any(self.out.glob("*.tar")):
            raise ValueError(f"{self.out} holds tar files; {advice}")
        for path in sorted(self.out.glob("tokens-*.safetensors")) if self.out.is_dir() else ():
            self._check_settings(read_shard_header(path)[0]["settings"], advice)

    def _check_settings(self, there: Mapping[str, Any], advice: str) -> None:
        found = [
            f"{name} {_short(there.get(name))} there and {_short(self.settings[name])} here"
            for name in SETTINGS
            if there.get(name) != self.settings[name]
        ]
        if found:
            raise ValueError(f"{self.out} holds tokens of other settings: {'; '.join(found)}; {advice}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 90 else f"{text[:87]}..."
