"""Where a training run stands in its clips: the base of the data modules, resumable at the exact clip.

The training clips are numbered without end, and what clip number p is depends on (seed, p) alone. So the place of a
run is one number, which lies in the Lightning checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from ivideogpt.data.clips import PositionSampler


class PositionDataModule(L.LightningDataModule):
    """Counts the training batches; a subclass calls `count_batch` for each in `on_after_batch_transfer`.

    Args:
        batch_size: Clips of a batch on each device.
        num_workers: Loading processes on each device.
        seed: Decides the order and content of all training clips.
        epoch_batches: Batches that the trainer calls an epoch; None: one pass over the training set.

    Raises:
        ValueError: A number is too low.
    """

    def __init__(self, batch_size: int, num_workers: int, seed: int, epoch_batches: int | None) -> None:
        super().__init__()
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"too low: batch_size {batch_size}, num_workers {num_workers}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.batch_size, self.num_workers, self.seed, self.epoch_batches = batch_size, num_workers, seed, epoch_batches
        self._start, self._taken = 0, 0  # first clip of this run; batches trained on since

    def setup(self, stage: str | None = None) -> None:
        """A new fit starts at clip 0 unless a checkpoint is loaded after this."""
        if stage == "fit":
            self._start, self._taken = 0, 0

    def count_batch(self) -> None:
        """Notes that a training batch has come."""
        self._taken += 1

    def training_loader(self, clips: Dataset, collate: Any) -> DataLoader:
        """Endless training clips from the position on, cut into epochs of `epoch_batches`."""
        rank, ranks = rank_and_world(self.trainer)
        epoch = self.epoch_batches or max(1, len(clips) // (self.batch_size * ranks))  # type: ignore[arg-type]
        sampler = PositionSampler(clips, lambda: self.position, self.batch_size, epoch, ranks, rank)
        return ResumableLoader(self, clips, sampler, collate)

    def loader_options(self) -> dict[str, Any]:
        """Arguments that the loaders share."""
        return {
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": _outlive_sigterm,
        }

    @property
    def position(self) -> int:
        """Number of the first clip that has not been trained on (batches that are only prefetched do not count)."""
        taken = self._taken
        if self.trainer is not None and self.trainer.training:
            progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
            taken -= progress.ready > progress.processed  # a batch whose update has not happened yet
        return self._start + max(taken, 0) * self.batch_size * rank_and_world(self.trainer)[1]

    def state_dict(self) -> dict[str, Any]:
        """Position, seed and what the clips are drawn from, for the checkpoint."""
        digest = self.clips_digest()
        return {"position": self.position, "seed": self.seed} | ({"clips": digest} if digest else {})

    def clips_digest(self) -> str:
        """Of everything beside the seed that decides which clip comes when; empty where a subclass does not say."""
        return ""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the position of a checkpoint; the batch size and the number of ranks may differ."""
        if state_dict["seed"] != self.seed:
            raise ValueError(
                f"the checkpoint was made with data seed {state_dict['seed']}, this run has {self.seed}: "
                "its clips would not be the ones that follow"
            )
        before, now = state_dict.get("clips", ""), self.clips_digest()
        if before and now and before != now:
            warnings.warn(
                f"the checkpoint was made with other training sets or clips than these: the order goes on at clip "
                f"{state_dict['position']}, but it is another order",
                stacklevel=2,
            )
        self._start, self._taken = int(state_dict["position"]), 0


def _outlive_sigterm(worker: int) -> None:
    """Ends a worker by its parent's SIGTERM alone.

    A job scheduler sends SIGTERM to every process, and the training still needs its workers while it saves.
    """
    if not hasattr(signal, "sigwaitinfo"):  # not on macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # here, so that all later threads inherit it
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class ResumableLoader(DataLoader):
    """A DataLoader whose state is the data module's, which tells Lightning that it resumes in mid-epoch."""

    def __init__(self, datamodule: PositionDataModule, clips: Dataset, sampler: PositionSampler, collate: Any):
        options = datamodule.loader_options()
        super().__init__(
            clips, datamodule.batch_size, sampler=sampler, drop_last=True, collate_fn=collate, **options
        )  # fmt: skip
        self.datamodule = datamodule

    def state_dict(self) -> dict[str, Any]:
        """See `PositionDataModule.state_dict`."""
        return self.datamodule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `PositionDataModule.load_state_dict`."""
        self.datamodule.load_state_dict(state_dict)


def rank_and_world(trainer: L.Trainer | None) -> tuple[int, int]:
    """Rank and number of ranks, from the trainer, torch.distributed or the launcher's variables."""
    if trainer is not None:
        return trainer.global_rank, trainer.world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
