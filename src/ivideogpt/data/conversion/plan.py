"""The units of a conversion: a function of the source and the options alone, never of who does the work."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from ivideogpt.data.blocks import DEFAULT_CODEC, codec_named
from ivideogpt.data.conversion.listing import Listing, Piece
from ivideogpt.data.manifest import package_version

MOST_EPISODES, LEAST_EPISODES, WANTED_UNITS = 512, 16, 64
"""A unit has at most and, in a small source, at least so many episodes; a source should have so many units."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is done to every episode, and where a shard ends.

    Args:
        resize: Centre-crop and resize to this many pixels; None leaves the frames.
        shard_bytes: A shard is closed when it holds so many bytes.
        strict: A bad episode ends the conversion.
        codec: How frames are stored (`blocks.codec_named`).
    """

    resize: int | None = None
    shard_bytes: int = 256 * 2**20
    strict: bool = False
    codec: str = DEFAULT_CODEC


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one process converts at a time.

    Args:
        number: Of the unit.
        part: Number of the set that its shards go to: 0, or 1 for episodes kept apart.
        pieces: Pieces, each with the numbers of its episodes that are taken; None takes all. What a piece lists beyond
            its count is taken in set 0.
        episodes: Episodes expected.
    """

    number: int
    part: int
    pieces: tuple[tuple[Piece, frozenset[int] | None], ...]
    episodes: int


@dataclasses.dataclass
class Plan:
    """All units, and what tells this plan from another.

    Args:
        units: In order; those of one set follow one another.
        parts: Number of sets.
        total: Episodes in all, where it is known.
        facts: Everything that the shards depend on.
    """

    units: list[Unit]
    parts: int
    total: int | None
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """Of the facts."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    def difference(self, other: dict[str, Any]) -> str:
        """How this plan's facts differ from those of an earlier one, in words."""
        parts = [
            f"{name} was {other.get(name)!r}, now {self.facts.get(name)!r}"
            for name in sorted(self.facts.keys() | other.keys())
            if self.facts.get(name) != other.get(name) and name != "source_digest"
        ]
        return "; ".join(parts) or "its files were changed (size or time) since then"


def make_plan(
    listing: Listing, settings: Settings, holdout: float, holdout_every: int | None, facts: dict[str, Any]
) -> Plan:
    """Cuts a listing into units.

    Args:
        listing: The source.
        settings: Of the conversion.
        holdout: Share of the recordings that are kept apart, evenly spread; 0 for none.
        holdout_every: Keeps every so many-th recording apart; None for none.
        facts: What else the shards depend on (options, cameras).

    Raises:
        ValueError: Nothing can be kept apart.
    """
    total = listing.total
    held = _held_out(listing, holdout, holdout_every)
    parts = 2 if holdout or holdout_every else 1
    most = MOST_EPISODES if total is None else min(max(-(-total // WANTED_UNITS), LEAST_EPISODES), MOST_EPISODES)
    units: list[Unit] = []
    for part in range(parts):
        taken: list[tuple[Piece, frozenset[int] | None]] = []
        episodes, size = 0, 0.0
        for piece, chosen in _of_part(listing, held, part):
            count = (piece.count or 0) if chosen is None else len(chosen)
            taken.append((piece, chosen))
            episodes, size = episodes + count, size + piece.size * count / max(piece.count or 0, 1)
            if episodes >= most or size >= settings.shard_bytes:
                units.append(Unit(len(units), part, tuple(taken), episodes))
                taken, episodes, size = [], 0, 0.0
        if taken:
            units.append(Unit(len(units), part, tuple(taken), episodes))
    files, size_of_files = listing.files
    facts = facts | {
        "format": listing.name,
        "resize": settings.resize,
        "shard_bytes": settings.shard_bytes,
        "holdout": holdout,
        "holdout_every": holdout_every,
        "codec": [settings.codec, codec_named(settings.codec).block_length],
        "converter": package_version(),
        "episodes": total,
        "source_files": files,
        "source_bytes": size_of_files,
        "source_digest": listing.digest,
    }
    return Plan(units, parts, total, facts)


def _of_part(listing: Listing, held: set[int], part: int) -> Iterator[tuple[Piece, frozenset[int] | None]]:
    """The pieces that have episodes of a set, with their numbers inside the piece."""
    first = 0
    for piece in listing.pieces:
        if piece.count is None or not held:
            yield piece, None
            continue
        inside = range(piece.count)
        if part:
            chosen = frozenset(i for i in inside if listing.recording(first + i) in held)
        else:
            chosen = frozenset(i for i in inside if listing.recording(first + i) not in held)
        first += piece.count
        if chosen or (part == 0 and callable(piece.jobs)):  # which may list beyond its count what is wrong with a file
            yield piece, chosen


def _held_out(listing: Listing, share: float, every: int | None) -> set[int]:
    """Numbers of the recordings that are kept apart: evenly spread, the same ones in every run."""
    if not share and not every:
        return set()
    episodes = listing.total
    total = 0 if not episodes else 1 + max(listing.recording(number) for number in (0, episodes - 1))
    if listing.recordings is not None:
        total = 1 + max(listing.recordings)
    if total < 2:
        what = f"holdout_every={every}" if every else f"holdout={share}"
        raise ValueError(f"{what} needs a source of at least 2 recordings whose number is known, not a stream")
    if every:
        return set(range(every - 1, total, every)) or {total - 1}
    count = min(max(round(share * total), 1), total - 1)
    return {int((i + 0.5) * total / count) for i in range(count)}
