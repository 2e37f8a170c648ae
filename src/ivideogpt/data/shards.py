"""Writes episodes as WebDataset shards, so that a kill or a full disk leaves no broken set.

A set is a folder: `NAME-000000.tar`, `NAME-000001.tar`, ... with one member `KEY.safetensors` an episode (see
`codec`), an index of them (see `index`), and `manifest.json` (see `manifest`), which is the only way in: shards are
written under hidden names, renamed when whole, and the set exists from the moment when the manifest is replaced. Shards
and index of an older set go last.
"""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ivideogpt.data.blocks import DEFAULT_CODEC, codec_named
from ivideogpt.data.codec import Record, encode_episode
from ivideogpt.data.episode import Episode
from ivideogpt.data.index import KEY_PATTERN
from ivideogpt.data.manifest import (
    MANIFEST,
    SHARD_NAME,
    PixelError,
    ShardRow,
    commit_set,
    file_sha256,
    refuse_to_replace,
)

__all__ = ["MANIFEST", "ShardRow", "ShardSetWriter", "ShardWriter", "commit_set", "encoded"]

MEMBER_SUFFIX = ".safetensors"
SHARD_BYTES = 256 * 2**20


class ShardWriter:
    """Writes one shard: aside, under a hidden name of this process's own, until `close` renames it to `path`.

    Attributes:
        size: Bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        import webdataset  # here, as it imports torch, which simulator processes do without

        self.path, self.size = path, 0
        self.aside = path.with_name(f".{path.name.lstrip('.')}.{os.getpid()}.partial")
        self._row = ShardRow(0, "", [], {}, "", PixelError())
        self._file = open(self.aside, "wb")  # noqa: SIM115 - open across calls
        # mtime=0: equal input gives equal shards, and no extended header, which would double the reading time.
        self._tar: Any = webdataset.TarWriter(self._file, encoder=False, mtime=0)

    @property
    def episodes(self) -> int:
        """Episodes written so far."""
        return len(self._row.members)

    def write(self, key: str, episode: Episode) -> None:
        """Encodes and appends one episode."""
        self.write_encoded(key, *encoded(episode))

    def write_encoded(self, key: str, data: bytes, info: dict[str, Any]) -> None:
        """Appends an episode that was encoded elsewhere (`encoded`).

        Raises:
            ValueError: The key is not allowed, or the episode has another codec than those before it.
            OSError: It cannot be written; `abort` then.
        """
        if not KEY_PATTERN.match(key):
            raise ValueError(f"episode key {key!r} may hold letters, digits, '-' and '_' only, at most 81 of them")
        offset = self._tar.tarstream.offset + tarfile.BLOCKSIZE
        self._tar.write({"__key__": key, MEMBER_SUFFIX[1:]: data})
        self.size = offset + len(data)
        self._row.add(key, offset, len(data), zlib.crc32(data), info)

    def close(self) -> ShardRow:
        """Flushes the shard to the disk and gives it its name."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._row.size, self._row.sha256 = self.aside.stat().st_size, file_sha256(self.aside)
        os.replace(self.aside, self.path)
        return self._row

    def abort(self) -> None:
        """Removes what was written."""
        if not self._file.closed:
            self._tar.tarstream.fileobj.fileobj = io.BytesIO()  # what is still buffered goes nowhere
            with contextlib.suppress(OSError):
                self._file.close()
            self._tar.close()
        self.aside.unlink(missing_ok=True)


class ShardSetWriter:
    """Writes a shard set; use as a context manager.

    Leaving the block normally makes the set visible; leaving it by an exception removes what was begun and leaves an
    older set in the folder as it was. One writer a folder.

    Args:
        out: Folder of the set, created if absent.
        name: Prefix of the shard files.
        shard_bytes: A shard is closed when it holds at least this many bytes ...
        shard_episodes: ... or this many episodes.
        overwrite: Replace a set that is there already.
        command: The command line that makes the set; kept in the manifest.
        extra: Further JSON for the manifest (fidelity, options, ...).
        codec: Of what `write` encodes.

    Raises:
        ValueError: There is a set already and `overwrite` is False, or a bad name or codec.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        name: str = SHARD_NAME,
        shard_bytes: int = SHARD_BYTES,
        shard_episodes: int = 10_000,
        overwrite: bool = False,
        command: str = "",
        extra: dict[str, Any] | None = None,
        codec: str = DEFAULT_CODEC,
    ) -> None:
        self.out = Path(out)
        self.codec = codec_named(codec).name
        if not KEY_PATTERN.match(name):
            raise ValueError(f"shard name {name!r} may hold letters, digits, '-' and '_' only")
        refuse_to_replace(self.out, overwrite)
        self.name, self.shard_bytes, self.shard_episodes = name, shard_bytes, shard_episodes
        self.command = command
        self.extra = extra or {}
        self._staged: list[tuple[Path, ShardRow]] = []
        self._keys: set[str] = set()
        self._open: ShardWriter | None = None
        self._made_folder = False

    def __enter__(self) -> ShardSetWriter:
        self._made_folder = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        self._remove_partials()  # left by a process that was killed
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self._abort()
            return
        try:
            with self._explained():
                self._close_shard()
                commit_set(
                    self.out,
                    [(path, lambda row=row: row) for path, row in self._staged],  # type: ignore[misc]
                    name=self.name, command=self.command, extra=self.extra,
                )  # fmt: skip
                self._remove_partials()
        except BaseException:
            self._abort()
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
        self.write_encoded(key, *encoded(episode, self.codec))

    def write_encoded(self, key: str, data: bytes, info: dict[str, Any]) -> None:
        """Appends an episode that was encoded elsewhere (`encoded`), as parallel workers do."""
        if key in self._keys:
            raise ValueError(f"two episodes have the key {key!r}")
        with self._explained():
            if self._open is None:
                self._open = ShardWriter(self.out / f".{self.name}-{len(self._staged):06d}.tar.partial")
            self._open.write_encoded(key, data, info)
            self._keys.add(key)
            if self._open.size >= self.shard_bytes or self._open.episodes >= self.shard_episodes:
                self._close_shard()

    def _close_shard(self) -> None:
        if self._open is not None:
            self._staged.append((self._open.path, self._open.close()))
            self._open = None

    def _abort(self) -> None:
        if self._open is not None:
            self._open.abort()
        self._remove_partials()
        if self._made_folder:
            with contextlib.suppress(OSError):
                self.out.rmdir()

    def _remove_partials(self) -> None:
        for path in self.out.glob(".*.partial"):
            path.unlink(missing_ok=True)


def encoded(episode: Episode, codec: str = DEFAULT_CODEC) -> tuple[bytes, dict[str, Any]]:
    """The record of an episode and what `describe` says of it.

    Raises:
        ValueError: No codec has that name.
    """
    data, squared = encode_episode(episode, codec), 0
    if not codec_named(codec).lossless:
        squared = Record.open(lambda offset, size: data[offset : offset + size], len(data)).header["squared_error"]
    return data, describe(episode, codec, squared)


def describe(episode: Episode, codec: str, squared_error: int) -> dict[str, Any]:
    """What the set says of an episode, with its actions and rewards for the statistics.

    Args:
        episode: The episode.
        codec: Of its record.
        squared_error: Of its frames over all values, where the codec loses something.
    """
    return {
        "codec": codec,
        "error": PixelError(squared_error, episode.video.size, squared_error / episode.video.size),
        "frames": len(episode),
        "resolution": list(episode.resolution),
        "action_dim": episode.action_dim,
        "has_rewards": episode.rewards is not None,
        "fps": float(episode.fps),
        "source": episode.source,
        "camera": episode.camera,
        "licence": episode.licence,
        # The last action and the first reward are fillers where a recording has one fewer of each than frames.
        "actions": None if episode.actions is None else episode.actions[:-1],
        "rewards": None if episode.rewards is None else episode.rewards[1:, None],
    }
