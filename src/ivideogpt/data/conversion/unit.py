"""Converts one unit: reads its episodes one at a time, encodes them, and writes its shards aside.

An episode that cannot be read goes into quarantine with the reason. So does one whose file changed while its unit was
under way. What cannot be written ends the conversion.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ivideogpt.data.conversion.plan import Settings, Unit
from ivideogpt.data.episode import Episode
from ivideogpt.data.manifest import ShardRow, write_json
from ivideogpt.data.shards import ShardWriter, encoded
from ivideogpt.data.sources.frames import Job, files_of, stamp
from ivideogpt.data.transforms import fit_uint8

CRASHED = "reading it took its process down: the decoder crashed, or memory ran out"


class BadEpisodeError(ValueError):
    """An episode that cannot be read, where that ends the conversion."""


class CannotWriteError(OSError):
    """What was read cannot be written, as on a full disk."""


@dataclasses.dataclass
class Row:
    """What became of a unit, as its JSON file in the staging folder holds it.

    Args:
        episodes: Episodes that were written.
        frames: Their frames.
        quarantine: Key, reason and kind of what was left out; `episodes` where a line stands for several.
    """

    episodes: int
    frames: int
    quarantine: list[dict[str, Any]]


def row_file(folder: Path, number: int) -> Path:
    """Where the row of a unit is."""
    return folder / f"unit-{number:06d}.json"


def shard_file(folder: Path, number: int, index: int) -> Path:
    """Where a shard of a unit is."""
    return folder / f"unit-{number:06d}-{index:03d}.tar"


def convert_unit(
    unit: Unit,
    folder: Path,
    settings: Settings,
    crashed: Mapping[int, str],
    at: Callable[[int], None] = lambda index: None,
) -> Row:
    """Writes the shards and, last, the row of a unit; what an earlier try left is replaced.

    Args:
        unit: What to convert.
        folder: Staging folder.
        settings: What is done to each episode.
        crashed: Episodes, counted within the unit, that are left out unread, with the reason.
        at: Called with the number of the episode that is next, and at the end with their number.

    Raises:
        BadEpisodeError: Under `strict`.
        CannotWriteError: No space, say.
        ImportError: A package is missing that the format needs.
    """
    rows: list[ShardRow] = []
    quarantine: list[dict[str, Any]] = []
    writer: ShardWriter | None = None
    stamps: dict[Path, tuple[int, int]] = {}
    index = 0
    try:
        for index, (key, read) in enumerate(_chosen(unit)):
            at(index)
            try:
                if index in crashed:
                    raise ChildProcessError(crashed[index])
                data, info = _encoded(read, settings, stamps)
            except ImportError:
                raise
            except Exception as error:
                if settings.strict:
                    raise error if isinstance(error, ValueError) else BadEpisodeError(f"{key}: {error}") from error
                reason = str(error) or type(error).__name__
                line: dict[str, Any] = {"key": key, "reason": reason, "kind": type(error).__name__}
                episodes = getattr(error, "episodes", 1)
                quarantine.append(line | ({"episodes": episodes} if episodes > 1 else {}))
                continue
            with Writing(folder):
                if writer is None:
                    writer = ShardWriter(shard_file(folder, unit.number, len(rows)))
                writer.write_encoded(key, data, info)
                if writer.size >= settings.shard_bytes:
                    rows.append(writer.close())
                    writer = None
        at(index + 1)
        with Writing(folder):
            if writer is not None:
                rows.append(writer.close())
            members = [member for row in rows for member in row.members]
            row = Row(len(members), sum(member["frames"] for member in members), quarantine)
            shards = {"shards": [shard.to_json() for shard in rows]}
            write_json(row_file(folder, unit.number), dataclasses.asdict(row) | shards)
    except BaseException:
        if writer is not None:
            writer.abort()
        raise
    return row


class Writing:
    """Tells a failure to write from a failure to read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise CannotWriteError(error.errno, error.strerror or str(error), str(self.folder)) from error


def _chosen(unit: Unit) -> Iterator[Job]:
    for piece, chosen in unit.pieces:
        for index, job in enumerate(piece.listed()):
            beyond = piece.count is not None and index >= piece.count
            if unit.part == 0 if beyond else chosen is None or index in chosen:
                yield job


def _encoded(
    read: Callable[[], Episode], settings: Settings, stamps: dict[Path, tuple[int, int]]
) -> tuple[bytes, dict[str, Any]]:
    """The record of an episode and what the manifest keeps of it.

    Raises:
        ValueError: A file that it was read from has another size or time than in `stamps`, or than before.
    """
    files = list(files_of(read))
    for file in files:
        stamps.setdefault(file, stamp(file))
    for file in stamps.keys() - set(files):  # a unit reads file after file
        del stamps[file]
    try:
        episode = read()
    finally:
        for file in files:
            if stamp(file) != stamps[file]:
                raise ValueError(f"{file} changed while it was read")
    if settings.resize is not None:
        episode = _resized(episode, settings.resize)
    return encoded(episode, settings.codec)


def _resized(episode: Episode, resolution: int) -> Episode:
    video = fit_uint8(torch.from_numpy(np.ascontiguousarray(episode.video.transpose(0, 3, 1, 2))), resolution)
    return dataclasses.replace(episode, video=np.ascontiguousarray(video.numpy().transpose(0, 2, 3, 1)))
