"""Packs recordings into a shard set: of any known format, another shard set, or one WebDataset tar as a stream."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ivideogpt.data.codec import decode_episode
from ivideogpt.data.conversion import encode_all
from ivideogpt.data.episode import Episode
from ivideogpt.data.formats import guess_format, list_jobs
from ivideogpt.data.reader import EMBEDDED, POLICIES, ShardSet, refuse_commands
from ivideogpt.data.shards import (
    KEY_PATTERN,
    MANIFEST,
    MEMBER_SUFFIX,
    SHARD_BYTES,
    ShardSetWriter,
    package_version,
)
from ivideogpt.data.sources.frames import Job, failing

SET, STREAM = "shards", "stream"


@dataclasses.dataclass
class PackReport:
    """What was packed: folders written, episodes and frames in them, and (name, reason) of what was left out.

    Attributes:
        format: What the source was read as.
        resumed: Episodes that an earlier try had packed already.
    """

    folders: list[Path]
    episodes: int = 0
    frames: int = 0
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    format: str = ""
    resumed: int = 0


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Any = None,
    resize: int | None = None,
    holdout: float = 0.0,
    policy: str = "error",
    allow: Sequence[str] = (),
    overwrite: bool = False,
    command: str = "",
    progress: Callable[[int, int | None], None] | None = None,
    format: str | None = None,  # noqa: A002
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> PackReport:
    """Packs every episode of `source` into shards.

    A conversion that was killed, interrupted or ran out of disk goes on behind its last full shard when it is called
    in the same way again. The shards do not depend on that, nor on the number of processes.

    Args:
        source: Recordings of a known format, a shard set (folder, manifest or `embedded:...`), or the URL of one
            WebDataset tar of ours, read as a stream.
        out: Folder of the shard set. With `holdout` the sets are `out/train` and `out/heldout`.
        options: How to read the recordings: what `formats.FORMATS[format].options_class()` makes.
        resize: Centre-crop and resize the frames to this many pixels; None leaves them.
        holdout: Share of the episodes that is kept apart: at least one, evenly spread over the order of the source.
        policy: `error` stops at a bad episode and writes nothing; `skip` puts it into quarantine: it is left out and
            reported, and `quarantine.jsonl` in the first folder names it with the reason.
        allow: URLs that may be opened although they run a command (`pipe:` and other schemes), letter by letter.
        overwrite: Replace sets that are there, and begin anew.
        command: The command line to name in the manifest.
        progress: Called with (episodes done, episodes in all or None) after each.
        format: A name of `formats.FORMATS`; None recognises it where that is safe.
        workers: Processes that read and encode; sets and streams are read by this one.
        shard_bytes: A shard is closed when it holds so many.

    Raises:
        ValueError: Nothing to pack, nothing but bad episodes, a bad one under `error`, or arguments out of range.
        OSError: The output cannot be written; sets that were there stay whole.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not one of {POLICIES}")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout must be in [0, 1), got {holdout}")
    if resize is not None and resize < 8:
        raise ValueError(f"resize must be at least 8 pixels, got {resize}")
    if workers < 1:
        raise ValueError(f"at least 1 worker is needed, got {workers}")
    text = os.fspath(source)
    jobs, total, name = _jobs(text, format, options, policy, allow)
    if holdout and total is None and name != STREAM:  # their number is known when they have been listed
        jobs = list(jobs)
        total = len(jobs)
    held_out = _held_out(total, holdout)
    out = Path(out)
    report = PackReport([out / "train", out / "heldout"] if holdout else [out], format=name)
    inside = name in (SET, STREAM)
    what = [os.path.abspath(text), name, repr(options), resize, holdout, shard_bytes, package_version()]
    resume = None if overwrite or inside else hashlib.sha256(json.dumps(what).encode()).hexdigest()
    with ExitStack() as stack:
        writers = [
            stack.enter_context(
                ShardSetWriter(folder, shard_bytes=shard_bytes, overwrite=overwrite, command=command, resume=resume)
            )
            for folder in report.folders
        ]
        here: dict[str, int] = {}  # number of each episode that is to be read

        def left() -> Iterator[Job]:
            keys = _Keys()
            for number, (job_name, read) in enumerate(jobs):
                key = job_name if inside else keys.legal(job_name)
                writer = writers[int(number in held_out)]
                if key in writer.restored:
                    report.resumed += 1
                    report.episodes += 1
                    report.frames += writer.restored[key]
                else:
                    here[key] = number
                    yield key, read

        for key, result in encode_all(left(), resize, 1 if inside else workers):
            number = here.pop(key)
            if isinstance(result, Exception):
                if policy == "error":
                    raise result if isinstance(result, ValueError) else ValueError(f"{key}: {result}") from result
                report.skipped.append((key, str(result)))
                warnings.warn(f"{key} skipped ({len(report.skipped)} so far): {result}", stacklevel=2)
            else:
                writers[int(number in held_out)].write_encoded(key, *result)
                report.episodes += 1
                report.frames += result[1]["frames"]
            if progress is not None:
                progress(number + 1, total)
        gone = sum(len(writer.restored) for writer in writers) - report.resumed
        if gone:
            raise ValueError(f"{source} has changed: {gone} episodes packed before are not there now; use overwrite")
        if report.skipped and not report.episodes:
            key, reason = report.skipped[0]
            raise ValueError(f"all {len(report.skipped)} episodes of {source} are bad, the first, {key}: {reason}")
        writers[0].quarantine = [{"key": key, "reason": reason} for key, reason in report.skipped]
    return report


def _held_out(total: int | None, share: float) -> set[int]:
    """Numbers of the episodes kept apart: evenly spread, the same ones in every run."""
    if not share:
        return set()
    if total is None or total < 2:
        raise ValueError(f"holdout={share} needs a source of at least 2 episodes whose number is known, not a stream")
    count = min(max(round(share * total), 1), total - 1)
    return {int((i + 0.5) * total / count) for i in range(count)}


def _jobs(
    source: str, name: str | None, options: Any, policy: str, allow: Sequence[str]
) -> tuple[Iterable[Job], int | None, str]:
    """The episodes of a source in a fixed order, how many there are where that is known, and what it was read as."""
    if _is_set(source):
        shards = ShardSet(source, policy)
        return _of_set(shards), len(shards), SET
    refuse_commands(source, allow)
    if is_set_or_stream(source, allow):
        return _of_stream(source), None, STREAM
    name = guess_format(source) if name is None else name
    return *list_jobs(source, name, options), name


def is_set_or_stream(source: str, allow: Sequence[str] = ()) -> bool:
    """Whether `source` is shards of ours already, which say themselves how they are to be read."""
    return _is_set(source) or source in allow or source.endswith(".tar")


def _is_set(source: str) -> bool:
    path = Path(source)
    return source.partition(":")[0] == EMBEDDED or path.name == MANIFEST or (path / MANIFEST).is_file()


def _of_set(shards: ShardSet) -> Iterator[Job]:
    def read(index: int) -> Episode:
        episode = shards.episode(index)
        if episode is None:  # the set has warned already
            raise ValueError(shards.skipped[shards.key(index)])
        return episode

    return ((shards.key(index), partial(read, index)) for index in range(len(shards)))


def _of_stream(url: str) -> Iterator[Job]:
    """Episodes of one tar through WebDataset; `url` must have passed `refuse_commands`."""
    from webdataset.gopen import gopen

    count = 0
    try:
        with gopen(url) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is None or not member.name.endswith(MEMBER_SUFFIX):
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


class _Keys:
    """A legal and different episode key for each name, in the order that they come in."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def legal(self, name: str) -> str:
        """Letters, digits, '-' and '_', at most 81 of them."""
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name.removesuffix(".npz")).lstrip("-") or "episode"
        if len(stem) > 64:
            stem = f"{stem[-55:].lstrip('-')}-{zlib.crc32(name.encode()):08x}"
        key, count = stem, 0
        while key in self.seen:
            count += 1
            key = f"{stem}-{count}"
        self.seen.add(key)
        return key


def unique_keys(names: Iterable[str]) -> list[str]:
    """A legal and different episode key for each file name.

    >>> unique_keys(["a/b.npz", "a_b.npz"])
    ['a_b', 'a_b-1']
    """
    keys = _Keys()
    return [keys.legal(name) for name in names]
