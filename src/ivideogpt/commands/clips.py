"""Clips of a shard set in batches, as the evaluation takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ivideogpt.data.clips import ClipSettings, FixedClips, collate
from ivideogpt.data.mixtures import Mixture
from ivideogpt.data.reader import ShardSet

if TYPE_CHECKING:
    from ivideogpt.world_model import WorldModel


class ClipSet:
    """Fixed clips of a shard set, of the size and length that a model's rollouts of `horizon` frames need.

    Iterating gives batches: video uint8 (B, T, C, H, W), actions (B, T, A), rewards (B, T), key and source lists.

    Args:
        source: Shard set: a folder, or `embedded:heldout`.
        wm: The model.
        horizon: Frames to predict.
        clips_per_episode: Clips of each episode, evenly spaced; 1 starts at frame 0.
        batch_size: Clips of a batch.
        limit: At most so many clips, evenly chosen; None for all.

    Raises:
        ValueError: no such set, or a record that is not what it should be.
    """

    def __init__(
        self,
        source: str,
        wm: WorldModel,
        horizon: int,
        clips_per_episode: int = 1,
        batch_size: int = 16,
        limit: int | None = None,
    ) -> None:
        self.shards = ShardSet(source)
        settings = ClipSettings(wm.config.context_length + horizon, wm.config.tokenizer.resolution)
        self.clips = FixedClips(Mixture({source: self.shards}), settings, clips_per_episode)
        count = len(self.clips) if limit is None else min(limit, len(self.clips))
        self.positions = [index * len(self.clips) // count for index in range(count)]
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.positions)

    def clip(self, number: int) -> dict[str, Any]:
        """One clip, with `source` and the `start` frame in its episode."""
        position = self.positions[number]
        episode, start = self.clips.places[position]
        return self.clips[position] | {"source": self.shards.source(episode), "start": start}

    def batch(self, numbers: list[int]) -> dict[str, Any]:
        """Several clips, stacked."""
        clips = [self.clip(number) for number in numbers]
        return collate(clips) | {"source": [clip["source"] for clip in clips]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for first in range(0, len(self), self.batch_size):
            yield self.batch(list(range(first, min(first + self.batch_size, len(self)))))
