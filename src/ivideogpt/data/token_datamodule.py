"""The Lightning data module over token sets: the clips of `ivideogpt data tokenize`, resumable at the exact clip.

A training batch is a dict: `tokens` int64 (B, L), `actions` float32 (B, T, A) and `rewards` float32 (B, T) where the
set has them, `key` (list of B episode keys) and `clip` int64 (B,), the clips' global numbers. Validation batches hold
tokens too, or the video where `val` names shard sets with pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from ivideogpt.data.clips import ExactSampler
from ivideogpt.data.datamodule import VideoDataModule
from ivideogpt.data.mixtures import check_weights
from ivideogpt.data.position import PositionDataModule, rank_and_world
from ivideogpt.data.tokenized import TokenSet, collate_tokens, holds_tokens

AGREED = ("tokenizer_hash", "context_length", "segment_length", "resolution", "goal", "action_dim", "has_rewards")
"""What the token sets of one training must have in common."""


class TrainingTokens(Dataset[dict[str, Any]]):
    """dataset[p] is training clip number p, for any p >= 0; len() is one pass over the clips.

    Without weights every pass visits each clip once, in an order of its own; with weights each clip draws its set by
    weight, then a clip of it. Both are functions of (seed, p).

    Args:
        sets: Token sets.
        weights: A share for each set, adding up to 1; None: in proportion to their clips.
        seed: Of the order.
    """

    def __init__(self, sets: list[TokenSet], weights: list[float] | None, seed: int) -> None:
        self.sets, self.weights, self.seed = sets, weights, seed
        self._ends = np.cumsum([len(tokens) for tokens in sets])
        self._pass: tuple[int, np.ndarray] | None = None  # the order of the pass used last

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> dict[str, Any]:
        if self.weights is None:
            turn, slot = divmod(position, len(self))
            if self._pass is None or self._pass[0] != turn:
                self._pass = turn, np.random.default_rng([self.seed, turn, 1]).permutation(len(self))
            number = int(self._pass[1][slot])
            chosen = int(np.searchsorted(self._ends, number, side="right"))
            number -= int(self._ends[chosen - 1]) if chosen else 0
        else:
            rng = np.random.default_rng([self.seed, position, 2])
            chosen = int(rng.choice(len(self.sets), p=self.weights))
            number = int(rng.integers(len(self.sets[chosen])))
        return self.sets[chosen][number] | {"clip": position}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pass": None}


class TokenDataModule(PositionDataModule):
    """Clips from token sets.

    Args:
        train: A token set's folder, several, or weights by folder.
        val: Token sets for validation, or shard sets with pixels (needed by what draws or compares frames), whose clips
            are cut as those of the token sets; None: no validation.
        segment_length: Frames of a clip that the token sets must have; None takes what they have.
        context_length: Context frames that they must have; None takes what they have.
        batch_size: Clips of a batch on each device; None: 16, or what follows from `global_batch_size`.
        global_batch_size: Clips of an update, over all processes and accumulated batches, in place of `batch_size`.
        val_batch_size: The same in validation; None: as in training.
        num_workers: Loading processes on each device.
        seed: Decides the order of the training clips.
        use_actions: Deliver actions where the sets have them.
        use_rewards: Deliver rewards where the sets have them.
        val_clips_per_episode: Clips of each episode of a shard set in `val`, evenly spaced; 1 starts at frame 0.
        epoch_batches: Batches that the trainer calls an epoch, with `global_batch_size` updates; None: one pass over
            the training clips.
        verify: Hash every shard when it is opened.

    Raises:
        ValueError: Contradicting arguments, or sets that do not go together.
    """

    def __init__(
        self,
        train: str | list[str] | dict[str, float],
        val: str | list[str] | None = None,
        segment_length: int | None = None,
        context_length: int | None = None,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        val_batch_size: int | None = None,
        num_workers: int = 1,
        seed: int = 0,
        use_actions: bool = True,
        use_rewards: bool = True,
        val_clips_per_episode: int = 1,
        epoch_batches: int | None = None,
        verify: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, epoch_batches, global_batch_size, val_batch_size)
        self.train_source, self.val_source = train, [val] if isinstance(val, str) else val
        self.wanted = {"segment_length": segment_length, "context_length": context_length}
        self.val_clips_per_episode, self.verify = val_clips_per_episode, verify
        self._uses = {"actions": use_actions, "rewards": use_rewards}
        self._sets: tuple[list[TokenSet], list[TokenSet]] | None = None
        self._train_clips: TrainingTokens | None = None
        self._pixels: VideoDataModule | None = None  # validation clips with pixels

    # --- sets ---

    def sets(self) -> tuple[list[TokenSet], list[TokenSet]]:
        """The training and validation token sets; opened on first use and checked to go together."""
        if self._sets is None:
            train = self._open([self.train_source] if isinstance(self.train_source, str) else list(self.train_source))
            kinds = {holds_tokens(source) for source in self.val_source or ()}
            if len(kinds) > 1:
                raise ValueError(f"val mixes token sets and shard sets: {self.val_source}; give sets of one kind")
            val = self._open(self.val_source or []) if kinds == {True} else []
            first = train[0]
            unused = {"actions": "action_dim", "rewards": "has_rewards"}
            agreed = set(AGREED) - {unused[name] for name, wanted in self._uses.items() if not wanted}
            for tokens in [*train, *val]:
                for name in sorted(agreed):
                    here, there = first.manifest[name], tokens.manifest[name]
                    if here != there:
                        raise ValueError(
                            f"the token sets do not go together: {name} is {here} in {first.folder} and {there} in "
                            f"{tokens.folder}"
                        )
            for name, wanted in self.wanted.items():
                if wanted is not None and wanted != first.manifest[name]:
                    raise ValueError(
                        f"{first.folder} has clips of {name} {first.manifest[name]}, wanted are {wanted}: tokenize the "
                        f"recordings anew or change {name}"
                    )
            self._sets = train, val
            if kinds == {False}:
                self._pixels = self._pixel_module(first.manifest)
        return self._sets

    def _open(self, names: list[str]) -> list[TokenSet]:
        if not names or len(set(names)) != len(names):
            raise ValueError(f"name one or more different token sets, got {names}")
        return [TokenSet(name, self.verify) for name in names]

    def _pixel_module(self, manifest: Mapping[str, Any]) -> VideoDataModule:
        assert self.val_source is not None
        same = ("segment_length", "context_length", "resolution", "stride", "target_rate", "goal")
        module = VideoDataModule(
            self.val_source,
            self.val_source,
            **{name: manifest[name] for name in same},
            batch_size=self.given_batch_size,
            global_batch_size=self.global_batch_size,
            val_batch_size=self.given_val_batch_size,
            num_workers=self.num_workers,
            augment=False,
            use_actions=self._uses["actions"] and manifest["action_dim"] is not None,
            use_rewards=self._uses["rewards"] and manifest["has_rewards"],
            val_clips_per_episode=self.val_clips_per_episode,
            verify=self.verify,
        )
        for name, here, there in (
            ("action_dim", self.action_dim, module.action_dim),
            ("has_rewards", self.has_rewards, module.has_rewards),
        ):
            if here != there:
                raise ValueError(f"val {self.val_source}: {name} is {there}, and {here} in {self.train_source}")
        return module

    def _of_manifest(self, name: str) -> Any:
        return self.sets()[0][0].manifest[name]

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer that made the tokens."""
        return self._of_manifest("tokenizer_hash")

    @property
    def action_dim(self) -> int | None:
        """Width of the actions delivered; None without actions."""
        return self._of_manifest("action_dim") if self._uses["actions"] else None

    @property
    def has_rewards(self) -> bool:
        """Whether batches hold rewards."""
        return bool(self._of_manifest("has_rewards")) and self._uses["rewards"]

    @property
    def resolution(self) -> int:
        """Height and width of the frames that the tokens stand for, in pixels."""
        return self._of_manifest("resolution")

    @property
    def context_length(self) -> int:
        """Context frames of a clip."""
        return self._of_manifest("context_length")

    @property
    def segment_length(self) -> int:
        """Frames of a clip."""
        return self._of_manifest("segment_length")

    # --- loaders ---

    def prepare_data(self) -> None:
        """Opens the sets, so that a mistake shows before any stage of a recipe runs."""
        self.sets()

    def setup(self, stage: str | None = None) -> None:
        """Opens the sets; a new fit starts at clip 0 unless a checkpoint is loaded after this."""
        train, _ = self.sets()
        weights = None
        if isinstance(self.train_source, Mapping):
            weights = list(check_weights(self.train_source, list(self.train_source)).values())
        self._train_clips = TrainingTokens(train, weights, self.seed)
        super().setup(stage)

    def train_dataloader(self) -> DataLoader:
        """Endless training clips, cut into epochs of `epoch_batches`."""
        if self._train_clips is None:
            self.setup()
        assert self._train_clips is not None
        return self.training_loader(self._train_clips, self._collate)

    def val_dataloader(self) -> DataLoader | list:
        """The validation clips, each exactly once over all ranks; an empty list without a validation set."""
        _, val = self.sets()
        if self._pixels is not None:
            self._pixels.trainer = self.trainer
            return self._pixels.val_dataloader()
        if not val:
            return []
        clips: ConcatDataset = ConcatDataset(val)  # type: ignore[arg-type]
        sampler = ExactSampler(clips, *reversed(rank_and_world(self.trainer)))
        options = self.loader_options() | {"sampler": sampler, "collate_fn": sampler.collation(self._collate)}
        return DataLoader(clips, self.val_batch_size, **options)

    test_dataloader = val_dataloader

    def _collate(self, clips: list[dict[str, Any]]) -> dict[str, Any]:
        unwanted = {name for name, wanted in self._uses.items() if not wanted}
        return collate_tokens([{name: clip[name] for name in clip.keys() - unwanted} for clip in clips])

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int = 0) -> dict[str, Any]:
        """Counts the training batches; turns the frames of a validation clip with pixels into floats."""
        if "video" in batch:
            assert self._pixels is not None
            return self._pixels.on_after_batch_transfer(batch, dataloader_idx)
        if "clip" in batch:  # only training clips have a number
            self.count_batch()
        return batch
