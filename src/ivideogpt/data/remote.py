"""Where the files of a shard set are: in a folder, or behind a URL, from where whole shards are fetched when needed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path

from ivideogpt.data.file_cache import FileCache, RemoteError, UnreachableError, read_small
from ivideogpt.data.index import INDEX_PATTERN
from ivideogpt.data.manifest import MANIFEST
from ivideogpt.data.opening import ShardError, load_manifest

_LONGEST_MANIFEST, _LONGEST_INDEX = 2**28, 2**32
_LOOKED_AT = 4  # shards that one process has open at once, so that what is removed from the cache gives its room back


class FolderShards:
    """The shards of a set on the disk.

    Args:
        folder: Of the set.

    Raises:
        ShardError: It has no manifest that can be used.
    """

    open_files = 256  # a process often has 1024 descriptors

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, load_manifest(folder)
        self.paths = [folder / shard["name"] for shard in self.manifest["shards"]]

    def name(self, number: int) -> str:
        """What a shard is called in messages."""
        return str(self.paths[number])

    def path(self, number: int) -> Path:
        """The file of a shard, which may be missing."""
        return self.paths[number]

    def open(self, number: int) -> int:
        """Descriptor of a shard."""
        return os.open(self.paths[number], os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Nothing: all is here."""


class RemoteShards:
    """The shards of a set behind a URL; its manifest and index are fetched when it is opened.

    Args:
        url: Of the set's folder or its manifest.json.
        cache: Where its files are kept.

    Raises:
        ShardError: Its manifest or index cannot be fetched.
    """

    open_files = _LOOKED_AT

    def __init__(self, url: str, cache: FileCache) -> None:
        self.url, self.cache = url.removesuffix(MANIFEST).rstrip("/"), cache
        self.folder = cache.folder.parent / "sets" / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self._wanted: set[int] = set()
        self._refused: dict[int, str] = {}  # shards that are missing or wrong, and why
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._fetch(MANIFEST, _LONGEST_MANIFEST)
            except UnreachableError as error:
                if not (self.folder / MANIFEST).is_file():
                    raise
                warnings.warn(f"{error}: the set is taken as it was when it was opened last", stacklevel=4)
            self.manifest = load_manifest(self.folder)
            index = self.manifest.get("index")
            name = str(index.get("name")) if isinstance(index, dict) else ""
            if INDEX_PATTERN.match(name) and not (self.folder / name).exists():  # opening it refuses any other
                self._fetch(name, _LONGEST_INDEX)
        except OSError as error:
            raise ShardError(f"the shard set {self.url} cannot be opened: {error}") from error

    def _fetch(self, name: str, most: int) -> None:
        aside = self.folder / f".{name}.{os.getpid()}.{threading.get_ident()}.partial"
        try:
            aside.write_bytes(read_small(f"{self.url}/{name}", most))
            os.replace(aside, self.folder / name)
        finally:
            aside.unlink(missing_ok=True)

    def name(self, number: int) -> str:
        """What a shard is called in messages."""
        return f"{self.url}/{self.manifest['shards'][number]['name']}"

    def path(self, number: int) -> Path:
        """The file of a shard, fetched where it is not there yet."""
        return self.cache.fetch(*self._about(number))

    def open(self, number: int) -> int:
        """Descriptor of a shard, which is fetched where it is not there yet.

        Raises:
            RemoteError: The shard is not there.
            ShardError: The server does not answer, or the disk is full: of all shards, so the policy has no say.
        """
        if number in self._refused:
            raise RemoteError(self._refused[number])
        try:
            return self.cache.open(*self._about(number))
        except UnreachableError as error:
            raise ShardError(str(error)) from error
        except RemoteError as error:
            self._refused[number] = str(error)  # its other episodes need not ask again
            raise
        except OSError as error:
            raise ShardError(f"{self.name(number)} cannot be kept in {self.cache.folder}: {error}") from error

    def _about(self, number: int) -> tuple[str, int, str]:
        return self.name(number), self.manifest["shards"][number]["size"], self.manifest["shards"][number]["sha256"]

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Begins to fetch shards that will be needed soon, one after another beside everything else."""
        wanted = [number for number in numbers if not self.cache.has(self.manifest["shards"][number]["sha256"])]
        self._wanted = set(wanted)
        if wanted:
            threading.Thread(target=self._fetch_all, args=(wanted,), daemon=True).start()

    def _fetch_all(self, numbers: list[int]) -> None:
        for number in numbers:
            if number not in self._wanted:  # what came later is more urgent
                return
            with contextlib.suppress(OSError):  # whoever needs the shard will be told
                self.cache.fetch(*self._about(number), insist=False)
