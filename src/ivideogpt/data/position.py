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

BATCH_SIZE = 16
"""Clips of a batch on each device where nothing else is said."""


class PositionDataModule(L.LightningDataModule):
    """Counts the training batches; a subclass calls `count_batch` for each in `on_after_batch_transfer`.

    Args:
        batch_size: Clips of a batch on each device; None: 16, or what follows from `global_batch_size`.
        num_workers: Loading processes on each device.
        seed: Decides the order and content of all training clips.
        epoch_batches: Batches that the trainer calls an epoch, with `global_batch_size` updates; None: one pass over
            the training set.
        global_batch_size: Clips of an update, over all processes and accumulated batches; in place of `batch_size`.
        val_batch_size: Clips of a validation batch on each device; None: as in training.

    Raises:
        ValueError: A number is too low, or both batch sizes were given.
    """

    def __init__(
        self,
        batch_size: int | None,
        num_workers: int,
        seed: int,
        epoch_batches: int | None,
        global_batch_size: int | None = None,
        val_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size is not None and global_batch_size is not None:
            raise ValueError(
                f"batch_size {batch_size} and global_batch_size {global_batch_size} were both given: give the clips of "
                f"a device's batch or those of an update, and null for the other"
            )
        for name, value in (("batch_size", batch_size), ("global_batch_size", global_batch_size)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.given_batch_size, self.global_batch_size = batch_size, global_batch_size
        self.given_val_batch_size = val_batch_size
        self.num_workers, self.seed, self.epoch_batches = num_workers, seed, epoch_batches
        self._start, self._taken = 0, 0  # first clip of this run; batches trained on since

    def setup(self, stage: str | None = None) -> None:
        """A new fit starts at clip 0 unless a checkpoint is loaded after this."""
        if stage == "fit":
            self._start, self._taken = 0, 0

    @property
    def batch_size(self) -> int:
        """Clips of a training batch on each device.

        Raises:
            ValueError: `global_batch_size` does not divide by the processes and accumulated batches.
        """
        if self.global_batch_size is None:
            return self.given_batch_size or BATCH_SIZE
        return share_of(self.global_batch_size, rank_and_world(self.trainer)[1], accumulated_batches(self.trainer))

    @property
    def val_batch_size(self) -> int:
        """Clips of a validation batch on each device."""
        if self.given_val_batch_size is not None or self.global_batch_size is None:
            return self.given_val_batch_size or self.given_batch_size or BATCH_SIZE
        shares = rank_and_world(self.trainer)[1] * accumulated_batches(self.trainer)
        return max(self.global_batch_size // shares, 1)  # an evaluation makes no updates, whose clips would count

    def count_batch(self) -> None:
        """Notes that a training batch has come."""
        self._taken += 1

    def training_loader(self, clips: Dataset, collate: Any) -> DataLoader:
        """Endless training clips from the position on, cut into epochs of `epoch_batches`."""
        rank, ranks = rank_and_world(self.trainer)
        if self.global_batch_size is None:
            epoch = self.epoch_batches or max(1, len(clips) // (self.batch_size * ranks))  # type: ignore[arg-type]
        else:  # whole updates, as the trainer makes a smaller one of what is left at the end of an epoch
            updates = self.epoch_batches or max(1, len(clips) // self.global_batch_size)  # type: ignore[arg-type]
            epoch = updates * accumulated_batches(self.trainer)
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
        """Position, seed, what the clips are drawn from and how they are shared out, for the checkpoint."""
        digest = self.clips_digest()
        shares = {
            "processes": rank_and_world(self.trainer)[1],
            "accumulated": accumulated_batches(self.trainer),
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
        }
        return {"position": self.position, "seed": self.seed, **shares} | ({"clips": digest} if digest else {})

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


def share_of(global_batch_size: int, processes: int, accumulated: int) -> int:
    """Clips of one process's batch in an update of `global_batch_size`.

    Raises:
        ValueError: They do not divide.
    """
    clips, rest = divmod(global_batch_size, processes * accumulated)
    if rest:
        raise ValueError(
            f"global_batch_size {global_batch_size} does not divide by {processes} processes x {accumulated} "
            f"accumulated batches: make it a multiple of {processes * accumulated}, or change trainer.devices, "
            f"trainer.num_nodes or trainer.accumulate_grad_batches (with a discriminator, the module's accumulate)"
        )
    return clips


def accumulated_batches(trainer: L.Trainer | None) -> int:
    """Batches of an update on each device, by the trainer, or by the module in manual optimization."""
    if trainer is None:
        return 1
    return trainer.accumulate_grad_batches * getattr(trainer.lightning_module, "accumulate", 1)


def rank_and_world(trainer: L.Trainer | None) -> tuple[int, int]:
    """Rank and number of ranks, from the trainer, torch.distributed or the launcher's variables."""
    if trainer is not None:
        return trainer.global_rank, trainer.world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
