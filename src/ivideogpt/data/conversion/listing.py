"""The episodes of a source in a fixed order, in pieces: recordings of a format, a shard set, or one tar as a stream."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ivideogpt.data.codec import decode_episode
from ivideogpt.data.episode import Episode
from ivideogpt.data.file_cache import is_url
from ivideogpt.data.formats import FORMATS, choose_views, guess_format, list_jobs
from ivideogpt.data.manifest import MANIFEST, file_sha256
from ivideogpt.data.reader import EMBEDDED, ShardError, ShardSet, refuse_commands
from ivideogpt.data.shards import KEY_PATTERN, MEMBER_SUFFIX
from ivideogpt.data.sources.frames import Job, failing, files_of, stamp
from ivideogpt.data.sources.tfrecord import RecordJobs

SET, STREAM = "shards", "stream"
PIECE_EPISODES = 16
"""Episodes of a piece at most, where they are listed beforehand."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Neighbouring episodes of a source.

    Args:
        jobs: The episodes, or what lists them where they are read; with legal keys in place of names.
        count: Their number; None in a stream. What is listed beyond it belongs to the piece as well.
        size: Bytes of the source that they take, about.
    """

    jobs: tuple[Job, ...] | Callable[[], Iterable[Job]]
    count: int | None
    size: int

    def listed(self) -> Iterable[Job]:
        """The episodes as (key, how to read it)."""
        return self.jobs if isinstance(self.jobs, tuple) else self.jobs()


@dataclasses.dataclass
class Listing:
    """All pieces of a source.

    Args:
        name: What it was read as: a format, `SET` or `STREAM`.
        pieces: In order.
        views: Neighbouring episodes that are cameras of one recording.
        recordings: Number of the recording of each episode, where `views` does not say it.
        files: Files that the source consists of and their bytes.
        digest: Of their names, sizes and times; None for a stream, which has none.
    """

    name: str
    pieces: list[Piece]
    views: int = 1
    recordings: list[int] | None = None
    files: tuple[int, int] = (0, 0)
    digest: str | None = None

    @property
    def total(self) -> int | None:
        """Episodes in all, where it is known."""
        counts = [piece.count for piece in self.pieces]
        return None if None in counts else sum(count or 0 for count in counts)

    def recording(self, number: int) -> int:
        """The recording that an episode belongs to."""
        return number // self.views if self.recordings is None else self.recordings[number]


def list_source(
    source: str, name: str | None, options: Any, cameras: Sequence[str], allow: Sequence[str], piece_bytes: int
) -> Listing:
    """Lists a source; no file of it is read as a whole.

    Args:
        source: Recordings, a shard set (folder, manifest or `embedded:...`), or the URL of one tar of ours.
        name: The format; None recognises it.
        options: Of the format's options class, or None.
        cameras: Cameras to read, or `all`; none: the one that the format takes.
        allow: URLs that may be opened although they run a command.
        piece_bytes: A piece ends when it has so many bytes.

    Raises:
        ValueError: Nothing there, not known, or refused.
    """
    if _is_set(source):
        return _of_set(source)
    refuse_commands(source, allow)
    if is_set_or_stream(source, allow):
        return Listing(STREAM, [Piece(partial(_of_stream, source), None, 0)])
    name = guess_format(source) if name is None else name
    views = choose_views(source, name, options, cameras)
    found = [list_jobs(source, name, view)[0] for view in views]
    labels = [str(getattr(view, FORMATS[name].view or "")) for view in views] if len(views) > 1 else []
    pieces: Iterable[Piece]
    if isinstance(found[0], RecordJobs):
        rows = zip(*(jobs.parts() for jobs in found if isinstance(jobs, RecordJobs)), strict=True)
        pieces = [Piece(partial(_views, row, labels), row[0].count * len(row), row[0].size) for row in rows]
    else:
        jobs = list(_views(found, labels))
        keys = unique_keys(key for key, _ in jobs)
        pieces = _pieces([(key, read) for key, (_, read) in zip(keys, jobs, strict=True)], piece_bytes)
    listing = Listing(name, list(pieces), views=len(views))
    roots: list[Path] = [file for jobs in found[:1] if isinstance(jobs, RecordJobs) for file, _, _ in jobs.files]
    if not roots:
        roots = [file for _, read in found[0] for file in files_of(read)]
    roots += [Path(value) for value in _values(options) if isinstance(value, (str, Path)) and os.path.isfile(value)]
    listing.files, listing.digest = _digest(roots, Path(source))
    return listing


def _values(options: Any) -> list[Any]:
    return [] if options is None else [getattr(options, field.name) for field in dataclasses.fields(options)]


def _views(found: Sequence[Iterable[Job]], labels: Sequence[str]) -> Iterator[Job]:
    """The cameras of each recording side by side; one camera alone as it is."""
    if len(found) == 1:
        yield from found[0]
        return
    for row in zip(*found, strict=True):
        for (name, read), label in zip(row, labels, strict=True):
            key = f"{name.removesuffix('.npz')}-{re.sub(r'[^A-Za-z0-9_-]+', '_', label)}"
            yield _short(key), partial(_with_recording, read, row[0][0])


def _with_recording(read: Callable[[], Episode], recording: str) -> Episode:
    episode = read()
    return dataclasses.replace(episode, metadata=episode.metadata | {"recording": recording})


def _pieces(jobs: Iterable[Job], piece_bytes: int) -> Iterator[Piece]:
    """Jobs in groups; the bytes of a file are shared by the neighbours that read it."""
    group: list[Job] = []
    size, last = 0, None
    for job in jobs:
        file = next(iter(files_of(job[1])), None)
        if file is not None and file != last:
            size, last = size + max(stamp(file)[0], 0), file
        group.append(job)
        if len(group) >= PIECE_EPISODES or size >= piece_bytes:
            yield Piece(tuple(group), len(group), size)
            group, size = [], 0
    if group:
        yield Piece(tuple(group), len(group), size)


def _digest(files: Iterable[Path], root: Path) -> tuple[tuple[int, int], str]:
    """(number, bytes) of files, and a digest of their names, sizes and times of change."""
    digest, count, total, last = hashlib.sha256(), 0, 0, None
    for file in files:
        if file == last:
            continue
        last, (size, when) = file, stamp(file)
        name = file.relative_to(root) if file.is_relative_to(root) else Path(file.name)
        digest.update(f"{name.as_posix()}\0{size}\0{when}\n".encode())
        count, total = count + 1, total + max(size, 0)
    return (count, total), digest.hexdigest()


# Shards of ours


def is_set_or_stream(source: str, allow: Sequence[str] = ()) -> bool:
    """Whether `source` is shards of ours already, which say themselves how they are to be read."""
    return _is_set(source) or source in allow or source.endswith(".tar")


def _is_set(source: str) -> bool:
    if is_url(source):  # of a set, or of one tar
        return not source.endswith(".tar")
    path = Path(source)
    return source.partition(":")[0] == EMBEDDED or path.name == MANIFEST or (path / MANIFEST).is_file()


def _of_set(source: str) -> Listing:
    shards = _opened(source)
    jobs: list[Job] = [(shards.key(index), partial(_read_of_set, source, index)) for index in range(len(shards))]
    jobs += [(key, partial(failing, reason)) for key, reason in shards.skipped.items()]
    sizes = shards.index["size"].tolist() + [0] * len(shards.skipped)
    pieces = [
        Piece(tuple(jobs[first : first + PIECE_EPISODES]), len(jobs[first : first + PIECE_EPISODES]),
              sum(sizes[first : first + PIECE_EPISODES]))
        for first in range(0, len(jobs), PIECE_EPISODES)
    ]  # fmt: skip
    folder = shards.folder
    names = [] if is_url(source) else [shard["name"] for shard in shards.manifest["shards"]]
    files, digest = _digest([folder / name for name in (MANIFEST, *names)], folder)
    if is_url(source):  # the copy of the manifest is of today, whatever the set's age
        digest = file_sha256(folder / MANIFEST)
    recordings = shards.recordings()
    known = max(recordings) + 1
    recordings += range(known, known + len(shards.skipped))
    return Listing(SET, pieces, recordings=recordings, files=files, digest=digest)


@lru_cache(maxsize=1)
def _opened(source: str) -> ShardSet:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is skipped is a bad episode of the conversion
        return ShardSet(source, "skip")


def _read_of_set(source: str, index: int) -> Episode:
    shards = _opened(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        episode = shards.episode(index)
    if episode is None:
        raise ShardError(shards.skipped[shards.key(index)])
    return episode


def _of_stream(url: str) -> Iterator[Job]:
    """Episodes of one tar through WebDataset; `url` must have passed `refuse_commands`."""
    from webdataset.gopen import gopen

    count = 0
    try:
        with gopen(url) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if not member.name.endswith(MEMBER_SUFFIX):
                    continue
                file = tar.extractfile(member) if member.isfile() else None
                if file is None:
                    count += 1
                    reason = f"{url}: {member.name!r} is a link or a folder, not a file"
                    yield f"member {count}", partial(failing, reason)
                    continue
                key, data = member.name.removesuffix(MEMBER_SUFFIX), file.read()
                count += 1
                if KEY_PATTERN.match(key):
                    yield key, partial(decode_episode, data)
                else:
                    reason = f"{url}: member name {key!r} is not allowed (letters, digits, '-' and '_' only)"
                    yield f"member {count}", partial(failing, reason)
    except (tarfile.TarError, EOFError, OSError) as error:
        yield f"the rest after member {count}", partial(failing, f"{url}: not a whole tar file: {error}")


# Keys


def unique_keys(names: Iterable[str]) -> list[str]:
    """A legal and different episode key for each name, in the order that they come in.

    >>> unique_keys(["a/b.npz", "a_b.npz"])
    ['a_b', 'a_b-1']
    """
    seen: set[str] = set()
    keys = []
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name.removesuffix(".npz")).lstrip("-") or "episode"
        stem = _short(stem, name)
        key, count = stem, 0
        while key in seen:
            count += 1
            key = f"{stem}-{count}"
        seen.add(key)
        keys.append(key)
    return keys


def _short(key: str, name: str = "") -> str:
    """At most 64 characters, of a longer key the end and a checksum."""
    return key if len(key) <= 64 else f"{key[-55:].lstrip('-')}-{zlib.crc32((name or key).encode()):08x}"
