"""Files behind URLs, kept on the disk in a folder of bounded size that all processes of a machine share.

A file is fetched whole and aside, its size and hash are checked, and only then it gets its name, which is its hash:
what is there is whole and right, whichever process was killed while it fetched. Where the folder would grow beyond its
limit, the files that were used least recently go.

    SHA256          a whole file
    SHA256.lock     held by the process that fetches it
    SHA256.partial  what it has so far, already as long as it will be
    room.lock       held while room is made, or a file gets its name
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ivideogpt.data.locking import locked

SCHEMES = ("http", "https", "s3", "gs", "hf")
"""What fsspec reads by itself; none of them runs a command."""
EXTRAS = {"s3": "s3fs (pip install 'ivideogpt[s3]')", "gs": "gcsfs (pip install 'ivideogpt[gs]')"}

DEFAULT_LIMIT = 100e9
_ATTEMPTS, _FIRST_WAIT = 6, 0.5  # the waits double: 15.5 seconds of them in all
_SILENCE = 60.0  # seconds without a byte after which a connection counts as lost
_PATIENCE = 600.0  # seconds to wait for the room that others need
_PIECE = 2**20
_REFUSED = {400, 401, 403, 405, 410, 451}  # answers that will not change by asking again
_NAME = re.compile(r"[0-9a-f]{64}\Z")


class RemoteError(OSError):
    """Something behind a URL cannot be had: it does not answer, is not there, or is not what it should be."""


class UnreachableError(RemoteError):
    """A server that did not answer as it should, however often it was asked."""


def is_url(text: str) -> bool:
    """Whether `text` is a URL of one of `SCHEMES`; fsspec's chains of them (`a::b://`) are not."""
    scheme, separator, _ = text.partition("://")
    return bool(separator) and scheme.lower() in SCHEMES and "::" not in text


def cache_root() -> Path:
    """Where files are kept: `$IVIDEOGPT_CACHE`, or `~/.cache/ivideogpt`."""
    return Path(os.environ.get("IVIDEOGPT_CACHE") or Path.home() / ".cache" / "ivideogpt")


class FileCache:
    """The folder of fetched files.

    Args:
        root: The folder, None for `cache_root()`.
        limit: Bytes that the files may have together, those that are being fetched counted.

    Raises:
        ValueError: The limit is not positive.
    """

    def __init__(self, root: str | os.PathLike[str] | None = None, limit: float = DEFAULT_LIMIT) -> None:
        if not limit > 0:
            raise ValueError(f"the cache must have room for something, got a limit of {limit} bytes")
        self.folder, self.limit = (Path(root) if root is not None else cache_root()) / "files", limit

    def has(self, sha256: str) -> bool:
        """Whether a file is there."""
        return (self.folder / _checked(sha256)).is_file()

    def open(self, url: str, size: int, sha256: str) -> int:
        """Opens a file for reading, fetched where it is not there yet; gives its descriptor.

        Raises:
            RemoteError: It cannot be fetched, or is not what it should be.
            OSError: It cannot be written.
        """
        while True:
            path = self.fetch(url, size, sha256)
            with contextlib.suppress(FileNotFoundError):  # another process needed the room in between
                return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def fetch(self, url: str, size: int, sha256: str, insist: bool = True) -> Path:
        """The path of a file, fetched where it is not there yet.

        Args:
            url: Where it is.
            size: Its bytes.
            sha256: Its hash.
            insist: Wait where another process is fetching it, and ask again where it does not come; else come back.

        Raises:
            RemoteError: It cannot be fetched, or is not what it should be.
            OSError: It cannot be written.
        """
        path = self.folder / _checked(sha256)
        with contextlib.suppress(BlockingIOError):
            if not self._used(path):
                with locked(path.with_suffix(".lock"), wait=insist):
                    if not self._used(path):
                        self._fetch(url, size, sha256, path, _ATTEMPTS if insist else 1)
        return path

    @staticmethod
    def _used(path: Path) -> bool:
        """Whether a file is there; notes that it was used."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, url: str, size: int, sha256: str, path: Path, attempts: int) -> None:
        aside = path.with_suffix(".partial")
        try:
            waited = time.monotonic() + (_PATIENCE if attempts > 1 else 0)
            while not self._make_room(url, size, aside):
                if time.monotonic() > waited:
                    raise UnreachableError(
                        f"{url} has {size:,} bytes, and the {self.limit:,.0f} that the cache in {self.folder} may have "
                        "are being fetched by other processes: raise its limit"
                    )
                time.sleep(0.1)
            _insisting(url, lambda: _copy(url, aside, size, sha256), attempts)
            with self._alone():  # who adds up what is there shall not miss both names
                os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.folder / "room.lock")

    def _make_room(self, url: str, size: int, aside: Path) -> bool:
        """Removes files until one more of `size` fits, and takes its place; False where others fetch too much now."""
        if size > self.limit:
            raise RemoteError(
                f"{url} has {size:,} bytes and the cache in {self.folder} may have {self.limit:,.0f}: raise its limit"
            )
        with self._alone():
            aside.unlink(missing_ok=True)
            found = []
            for entry in os.scandir(self.folder):
                stale = entry.name.endswith(".partial") and _nobody_fetches(Path(entry.path))
                if stale:
                    Path(entry.path).unlink(missing_ok=True)
                elif not entry.name.endswith(".lock"):
                    with contextlib.suppress(FileNotFoundError):
                        about = entry.stat()
                        found.append((about.st_mtime, about.st_size, Path(entry.path)))
            used = sum(entry_size for _, entry_size, _ in found)
            if size + sum(entry_size for _, entry_size, path in found if path.suffix == ".partial") > self.limit:
                return False
            for _, entry_size, entry_path in sorted(found):
                if used + size <= self.limit:
                    break
                if entry_path.suffix != ".partial":
                    entry_path.unlink(missing_ok=True)
                    used -= entry_size
            with open(aside, "wb") as file:
                file.truncate(size)
        return True


def _checked(sha256: str) -> str:
    if not isinstance(sha256, str) or not _NAME.match(sha256):
        raise RemoteError(f"{sha256!r} is no SHA-256, so the file cannot be checked")
    return sha256


def _nobody_fetches(partial: Path) -> bool:
    """Whether the process that was fetching a file is gone."""
    try:
        with locked(partial.with_suffix(".lock"), wait=False):
            return True
    except BlockingIOError:
        return False


class _NetworkError(Exception):
    """What a later attempt may mend."""


class _WrongFileError(_NetworkError):
    """A file that came whole and is another one; if it always is, the file is bad and not the network."""


_Result = TypeVar("_Result")


def _insisting(url: str, action: Callable[[], _Result], attempts: int = _ATTEMPTS) -> _Result:
    """What an action over a network gives, tried again and again, longer and longer apart."""
    for number in range(attempts):
        try:
            return action()
        except _NetworkError as error:
            if number == attempts - 1:
                kind = RemoteError if isinstance(error, _WrongFileError) else UnreachableError
                raise kind(f"{url}: {error} (asked {attempts} times)") from error
            wait = _FIRST_WAIT * 2**number
            warnings.warn(f"{url}: {error}; asked again in {wait:g} s", stacklevel=3)
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def read_small(url: str, most: int) -> bytes:
    """All bytes of a file behind a URL, at most `most`.

    Raises:
        RemoteError: It is not there, does not come, or is longer.
    """
    return _insisting(url, lambda: b"".join(_pieces(url, most)))


def _copy(url: str, target: Path, size: int, sha256: str) -> None:
    """Copies a file from a URL over one of its size, and checks it."""
    digest, written = hashlib.sha256(), 0
    with open(target, "r+b") as file:
        for piece in _pieces(url, size):
            file.write(piece)
            digest.update(piece)
            written += len(piece)
    if written != size:
        raise _NetworkError(f"it ended after {written:,} of {size:,} bytes")
    if digest.hexdigest() != sha256:
        raise _WrongFileError("its SHA-256 is not the manifest's")


def _pieces(url: str, most: int) -> Iterator[bytes]:
    """The bytes behind a URL, at most so many, piece by piece."""
    scheme = url.partition("://")[0].lower()
    read = 0
    try:
        filesystem, path = _filesystem(url, scheme)
        # One request where a file system can stream, else it asks for the file block by block. With any size at all
        # that of HTTP does not ask for it, which takes any fault for a file that is not there.
        options = {"hf": {"block_size": 0}, "s3": {}, "gs": {}}.get(scheme, {"block_size": 0, "size": 1})
        with filesystem.open(path, "rb", **options) as remote:
            while piece := remote.read(_PIECE):
                read += len(piece)
                if read > most:
                    raise RemoteError(f"{url} has more than the {most:,} bytes that it may have")
                yield piece
    except RemoteError:
        raise
    except ImportError as error:
        raise RemoteError(f"{url}: reading {scheme}:// needs {EXTRAS.get(scheme, scheme)}") from error
    except FileNotFoundError as error:
        raise RemoteError(f"{url} is not there: {error}") from error
    except Exception as error:  # each file system has errors of its own
        status = getattr(error, "status", getattr(getattr(error, "response", None), "status_code", None))
        if isinstance(error, PermissionError) or (isinstance(status, int) and status in _REFUSED):
            raise RemoteError(f"{url} may not be read (are you logged in?): {error}") from error
        raise _NetworkError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error


def _filesystem(url: str, scheme: str) -> tuple[Any, str]:
    import fsspec

    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        import aiohttp

        # by default a file has five minutes in all
        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=_SILENCE)}
    return fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
