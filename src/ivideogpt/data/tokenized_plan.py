"""Which clips a token set is made of, numbered before anything is computed, and each of them as pixels.

Tokens of future frames depend on the context frames, so whole clips are tokenized, at chosen start frames of every
episode, each once as it is or as several draws of the training augmentation. What a clip looks like depends on the
seed and its place alone, never on the batch or the process.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from ivideogpt.data.clips import ClipSettings, cut_clip, stack
from ivideogpt.data.codec import CorruptRecordError
from ivideogpt.data.manifest import MANIFEST, file_sha256
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.segments import even_starts, last_start, shrink_stride
from ivideogpt.data.transforms import Augmentation, augment, random_crop, to_float


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """Which clips are made.

    Args:
        segment_length: Frames of a clip, the context and a goal frame counted.
        context_length: Context frames of the tokenizer.
        resolution: Height and width in pixels.
        stride: As for the data module; None: to `target_rate`.
        target_rate: Frames a second to aim at where `stride` is None.
        goal: Put the last frame of each clip in front of it.
        clips_per_episode: Evenly spaced clips of each episode; 1 starts at frame 0.
        every: A clip at every so many-th start frame instead.
        draws: Augmentation draws of each clip; 0: the clip as it is.
        seed: Of the draws.
    """

    segment_length: int
    context_length: int
    resolution: int
    stride: int | None = 1
    target_rate: float = 3.0
    goal: bool = False
    clips_per_episode: int | None = 4
    every: int | None = None
    draws: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.segment_length <= self.context_length:
            raise ValueError(
                f"segment_length {self.segment_length} must exceed the tokenizer's context_length {self.context_length}"
            )
        if (self.every is None) == (self.clips_per_episode is None):
            raise ValueError(f"give one of clips_per_episode and every, got {self.clips_per_episode} and {self.every}")
        for name, lowest in (("every", 1), ("clips_per_episode", 1), ("draws", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")


class ClipPlan(Dataset[dict[str, Any]]):
    """The clips of a token set: `plan[n]` is clip n with its frames as bytes, or says that its episode is bad.

    Args:
        sources: Shard sets.
        settings: Which clips.
        policy: `error` or `skip` for bad records.
        verify: Hash every shard when it is opened.

    Raises:
        ValueError: No such set, or episodes that do not agree on the width of actions or on having rewards.
    """

    def __init__(
        self, sources: Sequence[str], settings: PlanSettings, policy: str = "error", verify: bool = False
    ) -> None:
        if not sources or len(set(sources)) != len(sources):
            raise ValueError(f"name one or more different shard sets, got {list(sources)}")
        self.settings, self.names = settings, list(sources)
        self.sets = [ShardSet(source, policy, verify) for source in sources]
        self.clip_settings = ClipSettings(
            settings.segment_length, settings.resolution, settings.stride, settings.target_rate, goal=settings.goal
        )
        self.augmentation = Augmentation() if settings.draws else None
        self.action_dim = self._common("action_dim", "actions")
        self.has_rewards = bool(self._common("has_rewards", "rewards"))
        places = np.concatenate([self._places(number) for number in range(len(self.sets))], axis=1)
        self._source, self._episode, self._start_frame = places

    def _places(self, number: int) -> np.ndarray:
        """int32 (3, clips): source, episode and start frame of the clips of one source."""
        settings, shards = self.settings, self.sets[number]
        window = settings.segment_length - settings.goal
        episodes, frames = array("i"), array("i")  # tuples would take a gigabyte for ten million clips
        lengths, rates = shards.index["frames"].tolist(), shards.index["fps"].tolist()
        for index in range(len(shards)):
            length = lengths[index]
            stride = self.clip_settings.stride_of(rates[index], shards.source(index))
            if settings.every is None:
                assert settings.clips_per_episode is not None
                starts = even_starts(length, window, stride, settings.clips_per_episode)
            else:
                latest = last_start(length, window, shrink_stride(stride, length, window))
                starts = list(range(0, latest + 1, settings.every))
            episodes.extend([index] * len(starts))
            frames.extend(starts)
        return np.array([np.full(len(episodes), number), episodes, frames], np.int32)

    def _common(self, field: str, what: str) -> Any:
        """The value of an index field that all episodes share."""
        seen: dict[Any, str] = {}
        for name, shards in zip(self.names, self.sets, strict=True):
            for index in np.unique(shards.index[field], return_index=True)[1].tolist():
                seen.setdefault(shards.index.value(field, index), f"{shards.key(index)} of {name}")
        if len(seen) > 1:
            found = ", ".join(f"{value} ({where})" for value, where in seen.items())
            raise ValueError(f"the episodes do not agree on {what}: {field} is {found}; make token sets of their own")
        return next(iter(seen))

    def __len__(self) -> int:
        return len(self._source) * max(self.settings.draws, 1)

    def __getitem__(self, number: int) -> dict[str, Any]:
        place, draw = divmod(number, max(self.settings.draws, 1))
        source, episode, start = int(self._source[place]), int(self._episode[place]), int(self._start_frame[place])
        shards = self.sets[source]
        about = {"key": shards.key(episode), "source": source, "episode": episode, "start": start, "draw": draw}
        record = shards.record(episode)
        if record is not None:
            crop = None
            if self.augmentation is not None:
                seed = self._seed(source, episode, start, draw)
                crop = partial(random_crop, config=self.augmentation, seed=seed, resolution=self.settings.resolution)
            try:
                return about | cut_clip(record, self.clip_settings, start, None, crop)
            except CorruptRecordError as error:
                shards.bad(episode, error)
        return about | {"bad": True}

    def to_pixels(self, batch: dict[str, Any]) -> Tensor:
        """Video (B, T, C, H, W) in [0, 1] of a batch of `collate_clips`, augmented, on the batch's device."""
        if self.augmentation is None:
            return to_float(batch["video"])
        places = zip(batch["source"], batch["episode"], batch["start"], batch["draw"], strict=True)
        seeds = [self._seed(*map(int, place)) for place in places]
        return augment(batch["video"], self.augmentation, seeds, self.settings.resolution, batch["cropped"].tolist())

    def _seed(self, source: int, episode: int, start: int, draw: int) -> tuple[int, ...]:
        return self.settings.seed, source, episode, start, draw, 6

    def describe(self) -> dict[str, Any]:
        """The part of `tokenized.SETTINGS` that the plan decides."""
        sources = [
            {"manifest_sha256": file_sha256(shards.folder / MANIFEST), "episodes": len(shards)} for shards in self.sets
        ]
        augmentation = None if self.augmentation is None else dataclasses.asdict(self.augmentation)
        return dataclasses.asdict(self.settings) | {"augmentation": augmentation, "sources": sources}


def collate_clips(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch of the good clips: stacked arrays, lists of the numbers and keys, and `skipped`, the bad ones' keys."""
    good = [clip for clip in clips if "bad" not in clip]
    batch: dict[str, Any] = {"skipped": [clip["key"] for clip in clips if "bad" in clip]}
    for name in ("video", "actions", "rewards", "cropped") if good else ():
        if name in good[0]:
            batch[name] = stack([clip[name] for clip in good])
    return batch | {name: [clip[name] for clip in good] for name in ("key", "source", "episode", "start", "draw")}
