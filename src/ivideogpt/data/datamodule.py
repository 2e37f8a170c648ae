"""The Lightning data module: shard sets in, batches of clips out, resumable at the exact clip.

A batch is a dict: `video` float32 (B, T, C, H, W) in [0, 1], `actions` float32 (B, T, A) and `rewards` float32 (B, T)
where the set has them, `key` (list of B episode keys) and, in training, `clip` int64 (B,), the clips' global numbers.
In validation `key` is empty where the batch must not count: see `clips.ExactSampler`.
Frames travel as uint8 and become floats, training clips also augmented, in `on_after_batch_transfer`, on the device.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from ivideogpt.data.choices import check_names
from ivideogpt.data.clips import ClipSettings, ExactSampler, FixedClips, TrainingClips, collate, crop_seed
from ivideogpt.data.file_cache import DEFAULT_LIMIT, FileCache
from ivideogpt.data.manifest import MANIFEST, file_sha256
from ivideogpt.data.mixture_names import PREFIX, named_mixture, temperature_weights
from ivideogpt.data.mixtures import DEFAULT_WINDOW, Mixture, of_cameras, recordings_of
from ivideogpt.data.position import PositionDataModule, rank_and_world
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.statistics import action_statistics
from ivideogpt.data.transforms import Augmentation, augment, to_float


class VideoDataModule(PositionDataModule):
    """Clips from shard sets.

    Args:
        train: A shard set, several, weights by shard set, or `mixture:NAME` for one of `mixtures.yaml`. A set is a
            folder, its manifest.json, or `embedded:train` / `embedded:heldout` for the recordings inside the package.
        val: Shard set or sets for validation; None holds episodes of `train` out (`holdout_every`).
        segment_length: Frames of a clip, the context and a goal frame counted.
        context_length: Context frames of the model; only checked against `segment_length`.
        resolution: Height and width in pixels; frames of another size are centre-cropped and resized.
        batch_size: Clips of a batch on each device; None: 16, or what follows from `global_batch_size`.
        global_batch_size: Clips of an update, over all processes and accumulated batches, in place of `batch_size`.
        val_batch_size: The same in validation; None: as in training.
        num_workers: Loading processes on each device.
        seed: Decides the order and content of all training clips.
        stride: Frames to move on for each frame of the clip; None: to `target_rate` by each episode's frame rate. By
            source (a name or a pattern such as `oxe/*`), None for those that are not named.
        target_rate: Frames a second to aim at where `stride` is None.
        horizon: Select the clip's frames at random out of a window of so many; None: consecutive frames.
        shuffle_frames: Put the frames of a training clip into random order.
        goal: Put the last frame of each clip in front of it.
        augment: Augment training clips (random resized crop and colours, one draw a clip).
        use_actions: Deliver actions where the sets have them.
        use_rewards: Deliver rewards where the sets have them.
        holdout_every: With `val=None`, every so many-th episode of `train` is for validation instead; None: no
            validation.
        val_segment_length: Frames of a validation clip; None: as in training.
        val_clips_per_episode: Clips of each validation episode, evenly spaced; 1 starts at frame 0.
        epoch_batches: Batches that the trainer calls an epoch, with `global_batch_size` updates; None: one pass over
            the training episodes.
        policy: `error` or `skip` for bad records.
        verify: Hash every shard when it is opened.
        root: Folder in which the data sets of a named mixture lie.
        temperature: Draw the sets of `train` in proportion to `frames ** (1 / temperature)` in place of weights.
        camera: Use the episodes of this camera only; by source, of those that are named.
        pad_actions: Let widths of actions differ: pad them with zeros to the widest and deliver `source`, a list of the
            clips' sources. For a transformer with several action spaces.
        window_shards: Shards of a set behind a URL whose episodes are mixed; as many are fetched ahead.
        cache: Folder in which files from behind URLs are kept; None: `$IVIDEOGPT_CACHE`, else `~/.cache/ivideogpt`.
        cache_gigabytes: What it may hold, in 10^9 bytes.

    Raises:
        ValueError: Contradicting arguments, or sets that do not go together.
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, float] = "embedded:train",
        val: str | list[str] | None = None,
        segment_length: int = 12,
        context_length: int = 2,
        resolution: int = 64,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        val_batch_size: int | None = None,
        num_workers: int = 1,
        seed: int = 0,
        stride: int | dict[str, int | None] | None = 1,
        target_rate: float = 3.0,
        horizon: int | None = None,
        shuffle_frames: bool = False,
        goal: bool = False,
        augment: bool = True,
        use_actions: bool = True,
        use_rewards: bool = True,
        holdout_every: int | None = None,
        val_segment_length: int | None = None,
        val_clips_per_episode: int = 1,
        epoch_batches: int | None = None,
        policy: str = "error",
        verify: bool = False,
        root: str = "runs/data",
        temperature: float | None = None,
        camera: str | dict[str, str] | None = None,
        pad_actions: bool = False,
        window_shards: int = DEFAULT_WINDOW,
        cache: str | None = None,
        cache_gigabytes: float = DEFAULT_LIMIT / 1e9,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, epoch_batches, global_batch_size, val_batch_size)
        if temperature is not None and isinstance(train, Mapping):
            raise ValueError(f"temperature {temperature} and weights were given for {list(train)}; give one of the two")
        self.root, self.temperature = root, temperature
        if window_shards < 1:
            raise ValueError(f"window_shards must be at least 1, got {window_shards}")
        self.window_shards, self.cache = window_shards, FileCache(cache, cache_gigabytes * 1e9)
        if pad_actions and not use_actions:
            raise ValueError("pad_actions delivers actions and use_actions: false leaves them out; give one of the two")
        self.pad_actions = pad_actions
        self.camera: dict[str, str] = {"*": camera} if isinstance(camera, str) else dict(camera or {})
        if segment_length <= context_length or context_length < 1:
            raise ValueError(f"segment_length {segment_length} must exceed context_length {context_length} >= 1")
        if resolution < 1:
            raise ValueError(f"resolution must be at least 1, got {resolution}")
        if holdout_every is not None and (holdout_every < 2 or val is not None):
            raise ValueError(f"holdout_every is {holdout_every}: it needs val=None and at least 2")
        self.train_source, self.val_source, self.holdout_every = train, val, holdout_every
        self.context_length = context_length
        self.val_clips_per_episode = val_clips_per_episode
        self.policy, self.verify = policy, verify
        self.augmentation = Augmentation() if augment else None
        common: dict[str, Any] = {
            "resolution": resolution,
            "stride": None if isinstance(stride, Mapping) else stride,
            "strides": tuple(stride.items()) if isinstance(stride, Mapping) else (),
            "target_rate": target_rate,
            "horizon": horizon,
            "goal": goal,
            "actions": use_actions,
            "rewards": use_rewards,
        }
        self.train_settings = ClipSettings(segment_length, shuffle=shuffle_frames, **common)
        self.val_settings = ClipSettings(val_segment_length or segment_length, **common)
        self._mixtures: tuple[Mixture, Mixture | None] | None = None
        self._train_clips: TrainingClips | None = None
        self._val_clips: FixedClips | None = None
        self._skipped_at_open = 0

    # --- sets ---

    def mixtures(self) -> tuple[Mixture, Mixture | None]:
        """The training and validation episodes; opened on first use and checked to go together."""
        if self._mixtures is None:
            train = self._open(self.train_source, self.temperature)
            val = None if self.val_source is None else self._open(self.val_source)
            opened = [shards for mixture in (train, val) if mixture is not None for shards in mixture.sets.values()]
            sources = {source for shards in opened for source in shards.index.sources}
            check_names([name for name, _ in self.train_settings.strides], sources, "stride")
            check_names(self.camera, sources, "camera")
            if self.holdout_every is not None:
                train, val = self._held_out(train, self.holdout_every)
            self._mixtures = train, val
            if self.pad_actions:
                self.train_settings, self.val_settings = (
                    dataclasses.replace(settings, action_width=self.action_dim or 1)
                    for settings in (self.train_settings, self.val_settings)
                )
            else:
                self._common("action_dim", "actions", self.train_settings.actions)
            self._common("has_rewards", "rewards", self.train_settings.rewards)
        return self._mixtures

    def _held_out(self, train: Mixture, every: int) -> tuple[Mixture, Mixture]:
        """Every so many-th recording, with all its cameras, apart from the others."""
        recordings = recordings_of(train)
        held = set(range(every - 1, max(recordings) + 1, every))
        if not held:
            raise ValueError(f"holdout_every={every} of {max(recordings) + 1} recordings leaves none")
        parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = [], []
        for episode, recording in zip(train.episodes, recordings, strict=True):
            parts[recording in held].append(episode)
        rest = Mixture(train.sets, train.weights, parts[0], self.window_shards)
        return rest, Mixture(train.sets, None, parts[1], self.window_shards)

    def _open(self, source: str | list[str] | Mapping[str, float], temperature: float | None = None) -> Mixture:
        if isinstance(source, str) and source.startswith(PREFIX):
            source = named_mixture(source.removeprefix(PREFIX), self.root)
        names = [source] if isinstance(source, str) else list(source)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"name one or more different shard sets, got {names}")
        sets = {name: ShardSet(name, self.policy, self.verify, self.cache) for name in names}
        self._skipped_at_open += sum(len(shards.skipped) for shards in sets.values())
        weights = source if isinstance(source, Mapping) else None
        if temperature is not None:
            sizes = {name: int(shards.index["frames"].sum()) for name, shards in sets.items()}
            weights = temperature_weights(sizes, temperature)
        episodes = of_cameras(sets, self.camera) if self.camera else None
        mixture = Mixture(sets, weights, episodes, self.window_shards)
        mixture.check_room(self.cache.limit)
        return mixture

    def _common(self, field: str, what: str, wanted: bool) -> Any:
        """The value of a manifest field that all episodes share; None where it is not wanted."""
        if not wanted:
            return None
        seen: dict[Any, str] = {}
        for mixture in self.mixtures():
            for name, index in mixture.episodes if mixture is not None else ():
                shards = mixture.sets[name]  # type: ignore[union-attr]
                value = shards.index.value(field, index)
                if value not in seen:
                    seen[value] = f"{shards.key(index)} of {name}"
        if len(seen) > 1:
            found = ", ".join(f"{value} ({where})" for value, where in seen.items())
            raise ValueError(
                f"the episodes do not agree on {what}: {field} is {found}; use sets that agree or use_{what}=False"
            )
        return next(iter(seen))

    @property
    def action_dim(self) -> int | None:
        """Width of the actions delivered; None without actions."""
        if self.pad_actions:
            return max((dim for dim in self.action_dims.values() if dim is not None), default=None)
        self.mixtures()
        return self._common("action_dim", "actions", self.train_settings.actions)

    @property
    def action_dims(self) -> dict[str, int | None]:
        """Width of the actions of each source.

        Raises:
            ValueError: Those of one source differ.
        """
        found: dict[str, int | None] = {}
        for mixture in self.mixtures():
            for shards in mixture.sets.values() if mixture is not None else ():
                columns = np.stack([shards.index["source"], shards.index["action_dim"]])
                for source, width in np.unique(columns, axis=1).T.tolist():
                    name = shards.index.sources[source]
                    if found.setdefault(name, width or None) != (width or None):
                        raise ValueError(f"the episodes of {name} have actions of the widths {found[name]} and {width}")
        return found

    def action_statistics(self, source: str = "*", but: Sequence[str] = ()) -> dict[str, list[float]]:
        """Mean and standard deviation of the training sets' actions; see `statistics.action_statistics`."""
        train = self.mixtures()[0]
        manifests = {name: shards.manifest for name, shards in train.sets.items()}
        return action_statistics(manifests, train.weights, source, but)

    @property
    def has_rewards(self) -> bool:
        """Whether batches hold rewards."""
        self.mixtures()
        return bool(self._common("has_rewards", "rewards", self.train_settings.rewards))

    @property
    def resolution(self) -> int:
        """Height and width of the frames delivered, in pixels."""
        return self.train_settings.resolution

    @property
    def segment_length(self) -> int:
        """Frames of a training clip."""
        return self.train_settings.segment_length

    @property
    def skipped(self) -> int:
        """Records found bad when the sets were opened, and reads of bad ones since, over all workers of this rank."""
        self.mixtures()
        return self._skipped_at_open + sum(int(c.skips) for c in (self._train_clips, self._val_clips) if c is not None)

    def clips_digest(self) -> str:
        """Of the training episodes, their weights and how clips are cut."""
        train = self.mixtures()[0]
        weights = None if train.weights is None else list(train.weights.values())  # wherever the sets lie
        digest = hashlib.sha256(repr((self.train_settings, weights, self.augmentation)).encode())
        digest.update(repr((bool(train.remote) and self.window_shards, self.holdout_every, self.camera)).encode())
        for shards in train.sets.values():
            digest.update(file_sha256(shards.folder / MANIFEST).encode() + f"{len(shards)}".encode())
        return digest.hexdigest()[:16]

    # --- loaders ---

    def setup(self, stage: str | None = None) -> None:
        """Opens the sets; a new fit starts at clip 0 unless a checkpoint is loaded after this."""
        train, val = self.mixtures()
        self._train_clips = TrainingClips(train, self.train_settings, self.seed, self.augmentation)
        if val is not None:
            self._val_clips = FixedClips(val, self.val_settings, self.val_clips_per_episode)
            if self.policy == "skip":
                self._val_clips.drop_bad()
        super().setup(stage)

    def train_dataloader(self) -> DataLoader:
        """Endless training clips, cut into epochs of `epoch_batches`."""
        if self._train_clips is None:
            self.setup()
        assert self._train_clips is not None
        return self.training_loader(self._train_clips, collate)

    def val_dataloader(self) -> DataLoader | list:
        """The fixed clips, each exactly once over all ranks; an empty list without a validation set."""
        if self._val_clips is None:
            self.setup()
        if self._val_clips is None:
            return []
        rank, ranks = rank_and_world(self.trainer)
        sampler = ExactSampler(self._val_clips, ranks, rank)
        options = self.loader_options() | {"sampler": sampler, "collate_fn": sampler.collation(collate)}
        return DataLoader(self._val_clips, self.val_batch_size, **options)

    test_dataloader = val_dataloader

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int = 0) -> dict[str, Any]:
        """Turns uint8 frames into floats and augments training clips, each from (seed, clip number)."""
        training = "clip" in batch  # only training clips have a number
        if training:
            self.count_batch()
        if training and self.augmentation is not None:
            seeds = [crop_seed(self.seed, number) for number in batch["clip"].tolist()]
            cropped = batch.pop("cropped").tolist()
            video = augment(batch["video"], self.augmentation, seeds, self.resolution, cropped)
        else:
            video = to_float(batch["video"])
        if self.trainer is not None:  # as it did with what was a float before
            video = self.trainer.precision_plugin.convert_input(video)
        return batch | {"video": video}
