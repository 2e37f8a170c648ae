"""Clips by number: a map-style dataset, the samplers that split it over ranks, and the collation into batches.

Clip number p of training is a pure function of (seed, p): the mixture gives the episode, a generator seeded with both
gives start frame, selection and order. So it does not matter which rank or worker makes it, nor whether the run was
interrupted before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, default_collate

from ivideogpt.data.choices import chosen
from ivideogpt.data.codec import CorruptRecordError, Record
from ivideogpt.data.mixtures import Mixture
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.segments import clip_indices, even_starts, frame_stride, gather_rows
from ivideogpt.data.transforms import Augmentation, fit_uint8, random_crop


@dataclasses.dataclass(frozen=True)
class ClipSettings:
    """How a clip is cut out of an episode; see `segments.clip_indices`.

    `stride=None` takes the stride that brings each episode to `target_rate` Hz. `strides` holds (pattern, stride) of
    sources that have one of their own. With an `action_width` actions are padded to it, zeros where there are none.
    """

    segment_length: int
    resolution: int
    stride: int | None = 1
    target_rate: float = 3.0
    horizon: int | None = None
    shuffle: bool = False
    goal: bool = False
    actions: bool = True
    rewards: bool = True
    strides: tuple[tuple[str, int | None], ...] = ()
    action_width: int | None = None

    def __post_init__(self) -> None:
        for stride in (self.stride, *(stride for _, stride in self.strides)):
            if stride is not None and (type(stride) is not int or stride < 1):
                raise ValueError(f"stride must be a whole number of at least 1, got {stride!r}")
        body = self.segment_length - self.goal
        if self.horizon is not None and self.horizon < body:
            raise ValueError(f"horizon {self.horizon} is shorter than the {body} frames to select from it")

    def stride_of(self, fps: float, source: str) -> int:
        """Wanted stride of an episode of `fps` frames a second."""
        stride = chosen(dict(self.strides), source, self.stride)
        return frame_stride(fps, self.target_rate) if stride is None else stride


def cut_clip(
    record: Record,
    settings: ClipSettings,
    start: int | None,
    rng: np.random.Generator | None,
    crop: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Decodes one clip: video uint8 (T, C, H, W) at the wanted resolution, actions (T, A) and rewards (T,) if any.

    The video keeps the frames' order in memory, channels last, in which bytes are cropped and resized fastest. Frames
    of another size are made to fit by `crop`, as the clip's `cropped` tells; without it by the largest centred square.
    """
    indices = clip_indices(
        len(record),
        settings.segment_length,
        stride=settings.stride_of(record.header["fps"], record.header["source"]),
        start=start,
        horizon=settings.horizon,
        shuffle=settings.shuffle,
        goal=settings.goal,
        rng=rng,
    )
    video = torch.from_numpy(record.frames(indices)).permute(0, 3, 1, 2)
    cropped = crop is not None and video.shape[-2:] != (settings.resolution, settings.resolution)
    clip = {"video": crop(video) if crop is not None and cropped else fit_uint8(video, settings.resolution)}
    if crop is not None:
        clip["cropped"] = torch.tensor(cropped)
    for name, wanted in (("actions", settings.actions), ("rewards", settings.rewards)):
        if wanted and name in record.tensors:
            clip[name] = torch.from_numpy(gather_rows(record.tensors[name], indices, settings.goal))
    if settings.action_width is not None:
        padded = torch.zeros(len(indices), settings.action_width)
        if "actions" in clip:
            padded[:, : clip["actions"].shape[1]] = clip["actions"]
        clip["actions"] = padded
    return clip


class _Clips(Dataset[dict[str, Any]]):
    """What training and validation clips share: reading with the policy about bad records."""

    def __init__(self, mixture: Mixture, settings: ClipSettings) -> None:
        self.mixture, self.settings = mixture, settings
        self.skips = torch.zeros(1, dtype=torch.int64).share_memory_()  # counted over all workers

    def read(
        self,
        episode: int,
        start: int | None,
        rng: Callable[[], np.random.Generator | None],
        crop: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Any] | None:
        """One clip of an episode; None if its record is bad and the policy is `skip`."""
        name, index = self.mixture.episodes[episode]
        shards: ShardSet = self.mixture.sets[name]
        record = shards.record(index)
        if record is not None:
            try:
                named = {"key": shards.key(index)}
                if self.settings.action_width is not None:  # whose actions are these?
                    named["source"] = shards.source(index)
                return named | cut_clip(record, self.settings, start, rng(), crop)
            except CorruptRecordError as error:
                shards.bad(index, error)
        self.skips += 1
        return None


class TrainingClips(_Clips):
    """dataset[p] is training clip number p, for any p >= 0; len() is one pass over the episodes.

    With an `augmentation` frames of another size than the clips' are cropped here, out of the whole frame; all the rest
    of it is left to the device.
    """

    def __init__(
        self, mixture: Mixture, settings: ClipSettings, seed: int, augmentation: Augmentation | None = None
    ) -> None:
        super().__init__(mixture, settings)
        self.seed, self.augmentation = seed, augmentation

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, position: int) -> dict[str, Any]:
        for name, shards in self.mixture.upcoming(self.seed, position):
            self.mixture.sets[name].files.prefetch(shards)
        crop = None
        if self.augmentation is not None:
            seed = crop_seed(self.seed, position)
            crop = partial(random_crop, config=self.augmentation, seed=seed, resolution=self.settings.resolution)
        first = self.mixture.draw(self.seed, position)
        for step in range(len(self.mixture)):  # a bad episode is replaced by the next good one
            episode = (first + step) % len(self.mixture)
            clip = self.read(episode, None, lambda: np.random.default_rng([self.seed, position, 3]), crop)
            if clip is not None:
                return clip | {"clip": position}
        raise RuntimeError("every episode of the training set is bad")


class FixedClips(_Clips):
    """The clips of a validation set: `clips_per_episode` of every episode, at fixed places, in a fixed order."""

    def __init__(self, mixture: Mixture, settings: ClipSettings, clips_per_episode: int = 1) -> None:
        super().__init__(mixture, settings)
        window = settings.horizon or settings.segment_length - settings.goal
        self.places: list[tuple[int, int]] = []
        for episode, (name, index) in enumerate(mixture.episodes):
            rows = mixture.sets[name].index
            stride = settings.stride_of(float(rows["fps"][index]), mixture.sets[name].source(index))
            starts = even_starts(int(rows["frames"][index]), window, stride, clips_per_episode)
            self.places.extend((episode, start) for start in starts)

    def drop_bad(self) -> None:
        """Decodes every clip once and drops the bad ones, so that the set stays exact under the policy `skip`."""
        self.places = [place for i, place in enumerate(self.places) if self._get(i) is not None]
        if not self.places:
            raise ValueError("every clip of the validation set is bad")

    def __len__(self) -> int:
        return len(self.places)

    def _get(self, position: int) -> dict[str, Any] | None:
        episode, start = self.places[position]
        # Selection and order, where wanted, are drawn from the place, so that they too are fixed.
        return self.read(episode, start, lambda: np.random.default_rng([episode, start, 4]))

    def __getitem__(self, position: int) -> dict[str, Any]:
        clip = self._get(position)
        if clip is None:
            raise RuntimeError(f"validation clip {position} went bad after the set was checked")
        return clip


def crop_seed(seed: int, position: int) -> tuple[int, int, int]:
    """Seed of the augmentation of training clip number `position`."""
    return seed, position, 5


class PositionSampler(DistributedSampler):
    """Numbers of the training clips of one rank, from a position on.

    The global batch that begins at position p holds the clips p .. p + batch_size * num_replicas - 1, of which rank r
    gets batch_size from p + r * batch_size on. It is a DistributedSampler so that Lightning leaves it in place.

    Args:
        dataset: The training clips.
        position: Called when an iteration starts; first clip number not yet trained on.
        batch_size: Clips of a rank's batch.
        epoch_batches: Batches that make an epoch for the trainer.
        num_replicas: Ranks.
        rank: This rank.
    """

    def __init__(
        self,
        dataset: Dataset,
        position: Callable[[], int],
        batch_size: int,
        epoch_batches: int,
        num_replicas: int,
        rank: int,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.position, self.batch_size, self.epoch_batches = position, batch_size, epoch_batches

    def __iter__(self) -> Iterator[int]:
        position, step = self.position(), self.batch_size * self.num_replicas
        done = (position // step) % self.epoch_batches  # an epoch that was interrupted is finished, not repeated
        for batch in range(self.epoch_batches - done):
            first = position + batch * step + self.rank * self.batch_size
            yield from range(first, first + self.batch_size)

    def __len__(self) -> int:
        return self.epoch_batches * self.batch_size


class ExactSampler(DistributedSampler):
    """Every clip of a fixed set exactly once over all ranks: rank r gets r, r + num_replicas, ...

    The ranks' counts may differ by one; torch's own sampler would repeat clips to even them out. A rank for which there
    is no clip gets another's, as it must take part in what the ranks compute together; it must not count, so that the
    batch has no `key`.
    """

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
        self.total = len(dataset)  # type: ignore[arg-type]

    @property
    def has_none(self) -> bool:
        """Whether there is no clip for this rank, but for others."""
        return 0 < self.total <= self.rank

    def collation(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Any:
        """`collate`, or where there is no clip for this rank one whose batches do not count."""
        return partial(_without_keys, collate) if self.has_none else collate

    def __iter__(self) -> Iterator[int]:
        return iter([self.rank % self.total] if self.has_none else range(self.rank, self.total, self.num_replicas))

    def __len__(self) -> int:
        return 1 if self.has_none else len(range(self.rank, self.total, self.num_replicas))


def _without_keys(collate: Callable[[list[dict[str, Any]]], dict[str, Any]], clips: list[dict[str, Any]]) -> Any:
    return collate(clips) | {"key": []}


def stack(rows: list[Tensor]) -> Tensor:
    """Stacks tensors, straight into shared memory in a worker; videos (T, C, H, W) stay channels last in memory."""
    if rows[0].ndim != 4:
        return default_collate(rows)
    return default_collate([row.permute(0, 2, 3, 1) for row in rows]).permute(0, 1, 4, 2, 3)


def collate(clips: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks clips: video (B,T,C,H,W) uint8, actions (B,T,A), rewards (B,T), clip (B,) in training, key list of B."""
    batch: dict[str, Any] = {
        name: stack([clip[name] for clip in clips])
        for name in ("video", "actions", "rewards", "cropped")
        if name in clips[0]
    }
    if "clip" in clips[0]:
        batch["clip"] = torch.tensor([clip["clip"] for clip in clips], dtype=torch.int64)
    for name in ("key", "source"):
        if name in clips[0]:
            batch[name] = [clip[name] for clip in clips]
    return batch
