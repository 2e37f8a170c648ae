"""Packs recordings into a shard set: from .npz files, another shard set, or one WebDataset tar as a stream."""

from __future__ import annotations

import dataclasses
import os
import re
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ivideogpt.data.codec import decode_episode
from ivideogpt.data.episode import Episode
from ivideogpt.data.reader import EMBEDDED, POLICIES, ShardSet, refuse_commands
from ivideogpt.data.shards import KEY_PATTERN, MANIFEST, MEMBER_SUFFIX, ShardSetWriter
from ivideogpt.data.sources.npz import NpzOptions, read_npz
from ivideogpt.data.transforms import fit_uint8

Job = tuple[str, Callable[[], Episode]]  # key of an episode and how to get it


@dataclasses.dataclass
class PackReport:
    """What was packed: folders written, episodes and frames in them, and (name, reason) of what was skipped."""

    folders: list[Path]
    episodes: int = 0
    frames: int = 0
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def pack(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: NpzOptions | None = None,
    resize: int | None = None,
    holdout: float = 0.0,
    policy: str = "error",
    allow: Sequence[str] = (),
    overwrite: bool = False,
    command: str = "",
    progress: Callable[[int, int | None], None] | None = None,
) -> PackReport:
    """Packs every episode of `source` into shards.

    Args:
        source: A folder with .npz files (searched through its subfolders), one .npz file, a shard set (folder,
            manifest or `embedded:...`), or the URL of one WebDataset tar of ours, read as a stream.
        out: Folder of the shard set. With `holdout` the sets are `out/train` and `out/heldout`.
        options: How to read .npz files.
        resize: Centre-crop and resize the frames to this many pixels; None leaves them.
        holdout: Share of the episodes that is kept apart: at least one, evenly spread over the order of the source.
        policy: `error` stops at a bad file and writes nothing; `skip` leaves it out, warns and reports it.
        allow: URLs that may be opened although they run a command (`pipe:` and other schemes), letter by letter.
        overwrite: Replace sets that are there.
        command: The command line to name in the manifest.
        progress: Called with (episodes done, episodes in all or None) after each.

    Raises:
        ValueError: Nothing to pack, a bad file under `error`, or arguments out of range.
        OSError: The output cannot be written; sets that were there stay whole.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy {policy!r} is not one of {POLICIES}")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout must be in [0, 1), got {holdout}")
    if resize is not None and resize < 8:
        raise ValueError(f"resize must be at least 8 pixels, got {resize}")
    jobs, total = _jobs(os.fspath(source), options or NpzOptions(), policy, allow)
    held_out = _held_out(total, holdout)
    out = Path(out)
    report = PackReport([out / "train", out / "heldout"] if holdout else [out])
    with ExitStack() as stack:
        writers = [
            stack.enter_context(ShardSetWriter(folder, overwrite=overwrite, command=command))
            for folder in report.folders
        ]
        for number, (key, read) in enumerate(jobs):
            try:
                episode = read()
            except ValueError as error:
                if policy == "error":
                    raise
                report.skipped.append((key, str(error)))
                warnings.warn(f"{key} skipped ({len(report.skipped)} so far): {error}", stacklevel=2)
            else:
                if resize is not None:
                    episode = _resized(episode, resize)
                writers[int(number in held_out)].write(key, episode)
                report.episodes += 1
                report.frames += len(episode)
            if progress is not None:
                progress(number + 1, total)
    return report


def _held_out(total: int | None, share: float) -> set[int]:
    """Numbers of the episodes kept apart: evenly spread, the same ones in every run."""
    if not share:
        return set()
    if total is None or total < 2:
        raise ValueError(f"holdout={share} needs a source of at least 2 episodes whose number is known, not a stream")
    count = min(max(round(share * total), 1), total - 1)
    return {int((i + 0.5) * total / count) for i in range(count)}


def _jobs(source: str, options: NpzOptions, policy: str, allow: Sequence[str]) -> tuple[Iterator[Job], int | None]:
    """The episodes of a source in a fixed order, and how many there are where that is known."""
    path = Path(source)
    if source.partition(":")[0] == EMBEDDED or path.name == MANIFEST or (path / MANIFEST).is_file():
        shards = ShardSet(source, policy)
        return _of_set(shards), len(shards)
    refuse_commands(source, allow)
    if source in allow or source.endswith(".tar"):
        return _of_stream(source), None
    files = [path] if path.is_file() else sorted(path.rglob("*.npz"))
    if not files:
        what = "holds no .npz file and no shard set" if path.is_dir() else "does not exist"
        raise ValueError(f"{source} {what}")
    keys = unique_keys([file.relative_to(path).as_posix() if path.is_dir() else file.name for file in files])
    jobs = ((key, partial(read_npz, file, options)) for key, file in zip(keys, files, strict=True))
    return jobs, len(files)


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

    def bad(reason: str) -> Episode:
        raise ValueError(reason)

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
                    yield f"member {count}", partial(bad, reason)
    except (tarfile.TarError, EOFError, OSError) as error:
        yield f"the rest after member {count}", partial(bad, f"{url}: not a whole tar file: {error}")


def unique_keys(names: Sequence[str]) -> list[str]:
    """A legal and different episode key for each file name.

    >>> unique_keys(["a/b.npz", "a_b.npz"])
    ['a_b', 'a_b-1']
    """
    keys: list[str] = []
    seen: set[str] = set()
    for name in names:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", name.removesuffix(".npz")).lstrip("-") or "episode"
        if len(stem) > 64:
            stem = f"{stem[-55:].lstrip('-')}-{zlib.crc32(name.encode()):08x}"
        key, count = stem, 0
        while key in seen:
            count += 1
            key = f"{stem}-{count}"
        seen.add(key)
        keys.append(key)
    return keys


def _resized(episode: Episode, resolution: int) -> Episode:
    video = fit_uint8(torch.from_numpy(np.ascontiguousarray(episode.video.transpose(0, 3, 1, 2))), resolution)
    return dataclasses.replace(episode, video=np.ascontiguousarray(video.numpy().transpose(0, 2, 3, 1)))
