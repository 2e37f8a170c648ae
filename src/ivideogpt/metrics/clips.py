"""Clips that a model is measured on: fixed places in the episodes of shard sets, as a protocol wants them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ivideogpt.data.clips import ClipSettings, FixedClips, collate
from ivideogpt.data.mixtures import Mixture
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.segments import clip_indices, shrink_stride
from ivideogpt.metrics.protocols import EvaluationProtocol


class ClipSet:
    """Fixed clips of shard sets, each of the length and size that a protocol has.

    A batch holds video uint8 (B, T, C, H, W), actions (B, T, A) and rewards (B, T) where there are any, and lists of
    keys, sources and start frames.

    Args:
        mixture: the shard sets, or part of their episodes.
        protocol: settled for a model (:meth:`EvaluationProtocol.settled`).
        batch_size: clips of a batch, when iterating.

    Raises:
        ValueError: if the recordings do not fit the protocol: too short, too few, too small, without actions.
    """

    def __init__(self, mixture: Mixture, protocol: EvaluationProtocol, batch_size: int = 16) -> None:
        assert protocol.resolution is not None
        self.mixture, self.protocol, self.batch_size = mixture, protocol, batch_size
        settings = ClipSettings(
            protocol.frames,
            protocol.resolution,
            stride=protocol.stride,
            target_rate=protocol.target_rate,
            strides=protocol.strides,
            goal=protocol.goal,
            actions=bool(protocol.actions),
            rewards=all(bool(mixture.sets[name].index.value("has_rewards", row)) for name, row in mixture.episodes),
        )
        self.clips = FixedClips(mixture, settings, protocol.clips_per_episode)
        self.notes: list[str] = []
        if any(shards.policy == "skip" for shards in mixture.sets.values()):
            before = len(self.clips)
            self.clips.drop_bad()
            if len(self.clips) < before:
                self.notes.append(f"{before - len(self.clips)} clips of damaged records were left out")
        self._check(settings)
        count = len(self.clips) if protocol.videos is None else protocol.videos
        # drawn once and for all: evenly spaced ones could meet every second task only
        chosen = np.random.default_rng(0).permutation(len(self.clips))[:count]
        self.positions: list[int] = sorted(chosen.tolist())

    @classmethod
    def open(cls, sources: str | Sequence[str], protocol: EvaluationProtocol, batch_size: int = 16) -> ClipSet:
        """Of one shard set or several: folders, or ``embedded:heldout``.

        Raises:
            ValueError: if there is no such set, or it does not fit the protocol.
        """
        names = [sources] if isinstance(sources, str) else list(sources)
        return cls(Mixture({name: ShardSet(name) for name in names}), protocol, batch_size)

    def at_most(self, count: int) -> ClipSet:
        """These clips, or ``count`` of them where there are more, by a protocol that says so."""
        if len(self) <= count:
            return self
        return ClipSet(self.mixture, self.protocol.changed(videos=count), self.batch_size)

    def _check(self, settings: ClipSettings) -> None:
        protocol, needed = self.protocol, settings.segment_length - settings.goal
        short, without, sizes = [], [], set()
        longest = needed
        for name, index in self.mixture.episodes:
            shards = self.mixture.sets[name]
            row = shards.index
            length, fps = int(row["frames"][index]), float(row["fps"][index])
            stride = settings.stride_of(fps, shards.source(index))
            if protocol.stride is None:  # is shrunk for short episodes
                stride = shrink_stride(stride, length, needed)
            if (needed - 1) * stride + 1 > length:
                short.append(f"{shards.key(index)} ({length} frames)")
                longest = max(longest, (needed - 1) * stride + 1)
            if protocol.actions and not int(row["action_dim"][index]):
                without.append(shards.key(index))
            sizes.add((int(row["height"][index]), int(row["width"][index])))
        if short:
            raise ValueError(
                f"{len(short)} of {len(self.mixture.episodes)} episodes are shorter than the {longest} frames of the "
                f"protocol ({protocol.context_length} given, {protocol.horizon} predicted, stride {protocol.stride}): "
                f"{', '.join(short[:3])}{', ...' if len(short) > 3 else ''}; give longer recordings or --horizon"
            )
        if without:
            raise ValueError(
                f"the protocol gives the model its recorded actions, and {len(without)} episodes have none: "
                f"{', '.join(without[:3])}{', ...' if len(without) > 3 else ''}"
            )
        wanted = protocol.resolution
        assert wanted is not None
        small = sorted(size for size in sizes if min(size) < wanted)
        if small:
            raise ValueError(
                f"the recordings have {small[0][0]} x {small[0][1]} pixels and the protocol {wanted} x {wanted}: "
                f"frames are never enlarged for a measurement; give recordings of at least that size"
            )
        for height, width in sorted(sizes - {(wanted, wanted)}):
            self.notes.append(
                f"recordings of {height} x {width} pixels were cropped and resized to {wanted} x {wanted}"
            )
        if protocol.videos is not None and protocol.videos > len(self.clips):
            raise ValueError(
                f"the protocol {protocol.name!r} is about {protocol.videos} clips, and there are {len(self.clips)}; "
                f"give --videos {len(self.clips)}, which makes it a custom protocol"
            )
        for name, shards in self.mixture.sets.items():
            codec = shards.manifest.get("codec") or {}
            if not codec.get("lossless", True):
                self.notes.append(
                    f"the frames of {name} are stored with the lossy codec {codec.get('name')!r}: scores are against "
                    f"what it left of them"
                )

    def __len__(self) -> int:
        return len(self.positions)

    def place(self, number: int) -> tuple[str, str, int]:
        """Key of a clip's episode, its source, and the start frame."""
        episode, start = self.clips.places[self.positions[number]]
        name, index = self.mixture.episodes[episode]
        shards = self.mixture.sets[name]
        return shards.key(index), shards.source(index), start

    def clip(self, number: int) -> dict[str, Any]:
        """One clip, with ``source`` and the ``start`` frame in its episode."""
        _, source, start = self.place(number)
        return self.clips[self.positions[number]] | {"source": source, "start": start}

    def batch(self, numbers: Sequence[int]) -> dict[str, Any]:
        """Several clips, stacked."""
        clips = [self.clip(number) for number in numbers]
        return collate(clips) | {name: [clip[name] for clip in clips] for name in ("source", "start")}

    def original(self, number: int) -> Tensor | None:
        """The clip's frames (T, C, H, W) as they are stored, uint8, uncropped; None where the record cannot be read."""
        episode, start = self.clips.places[self.positions[number]]
        name, index = self.mixture.episodes[episode]
        record, settings = self.mixture.sets[name].record(index), self.clips.settings
        if record is None:
            return None
        stride = settings.stride_of(record.header["fps"], record.header["source"])
        rows = clip_indices(len(record), settings.segment_length, stride=stride, start=start, goal=settings.goal)
        return torch.from_numpy(record.frames(rows)).permute(0, 3, 1, 2)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for first in range(0, len(self), self.batch_size):
            yield self.batch(range(first, min(first + self.batch_size, len(self))))

    def data(self) -> dict[str, Any]:
        """What tells these recordings from others: the shards' hashes, by set."""
        return {
            name: {shard["name"]: shard["sha256"] for shard in shards.manifest["shards"]}
            for name, shards in self.mixture.sets.items()
        }
