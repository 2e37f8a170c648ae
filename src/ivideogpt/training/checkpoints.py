"""Training checkpoints that survive a kill and a full disk: written whole or not at all, read without pickle."""

from __future__ import annotations

import os
import re
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ivideogpt.training.sharding import read_sharded_checkpoint, remove_checkpoint, sync

PATTERN = re.compile(r"update-(\d+)\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a file beside the target, syncs it and renames it over the target; loads tensors and plain data only.

    Lightning's own plugin writes through a temporary file too, but does not sync, and its temporary file may lie on
    another file system, where the last step is a copy.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Saves ``checkpoint``; on failure the file that was there before stays whole.

        Raises:
            OSError: naming the file, when it cannot be written.
        """
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            sync(target.parent)
        except (OSError, RuntimeError) as error:  # torch wraps a failed write in a RuntimeError
            partial.unlink(missing_ok=True)
            what = _reason(error)
            raise OSError(f"cannot write the checkpoint {target}: {what}. Earlier checkpoints are whole") from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Loads ``path``; no pickled code is ever run."""
        return torch.load(path, map_location=map_location, weights_only=True)


def _reason(error: BaseException) -> str:
    """What the operating system said; torch puts errors about positions in the file in front of it."""
    below: BaseException | None = error
    while below is not None and not isinstance(below, OSError):
        below = below.__cause__ or below.__context__
    return str(below) if below is not None else f"the file could not be written ({error})"


def checkpoint_files(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Checkpoints in ``folder`` with the number of updates they were saved after, newest first."""
    found = [(PATTERN.fullmatch(path.name), path) for path in Path(folder).glob("*.ckpt")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def latest_checkpoint(folder: str | os.PathLike[str]) -> tuple[int, Path] | None:
    """Newest checkpoint in ``folder`` that loads, and its number of updates; None if there is none.

    One that does not load is skipped with a warning.
    """
    for update, path in checkpoint_files(folder):
        try:
            if path.is_dir():
                state = read_sharded_checkpoint(path, tensors=False)
            else:
                state = AtomicCheckpointIO().load_checkpoint(path)
            if not {"state_dict", "global_step", "loops"} <= state.keys():
                raise ValueError(f"it holds {sorted(state)} only")
        except Exception as error:  # a damaged archive fails in many ways
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"skipping the checkpoint {path}, which does not load: {reason}", stacklevel=2)
            continue
        return update, path
    return None


class Preempted(SystemExit):
    """The process was asked to end (SIGTERM), has saved the training state, and ends with the usual exit code."""

    def __init__(self, update: int) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.update = update

    def __str__(self) -> str:
        return f"SIGTERM: saved at update {self.update}; the same command goes on from there"


class Checkpoints(Checkpoint):
    """Saves the training state every ``every_n_updates`` updates, at the end, and when the process is asked to end.

    SIGTERM, which job schedulers send before they kill, may come to any one of the processes; all save the update that
    is under way and exit with code 143.

    Args:
        every_n_updates: distance of two checkpoints; what a kill can cost.
        keep: newest checkpoints that stay; two at least make sure that one is good.
        folder: where they go; ``checkpoints`` in the trainer's root folder if None.
    """

    def __init__(self, every_n_updates: int = 500, keep: int = 2, folder: str | None = None) -> None:
        if every_n_updates < 1 or keep < 1:
            raise ValueError(f"every_n_updates and keep must be positive, got {every_n_updates!r}, {keep!r}")
        self.every_n_updates = every_n_updates
        self.keep = keep
        self.folder = folder
        self._last = -1
        self._before = -1  # update at which the current batch began
        self._asked = False
        self._handler: Any = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stops listening: there is no end of the training."""
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def _note(self, number: int, frame: Any) -> None:
        self._asked = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes what a resumed run has already saved, and listens for SIGTERM.

        It does so in place of Lightning, whose handler ends without saving and talks to the other processes from
        inside of it. Lightning's own is in place by now, and gone when this one gives way to it at the end.
        """
        self._last, self._asked = trainer.global_step, False
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._note)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes the update, to tell a batch that ends one from a batch whose gradients are only accumulated."""
        self._before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves where it is time to."""
        if trainer.global_step == self._before:
            return
        if trainer.global_step // self.every_n_updates > self._before // self.every_n_updates:  # some batches make two
            self._save(trainer)
        self._end_if_asked(trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """A validation can be longer than the time that is left."""
        if trainer.world_size == 1 and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._end_if_asked(trainer)  # processes may have other numbers of batches: they wait for its end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the final state, and stops listening."""
        self._save(trainer)
        self._stop_listening()  # before Lightning puts back what it found: after that it would undo it

    def _end_if_asked(self, trainer: Trainer) -> None:
        asked = self._asked
        if trainer.world_size > 1:
            asked = bool(trainer.strategy.reduce_boolean_decision(asked, all=False))
        if asked:
            self._save(trainer)
            raise Preempted(trainer.global_step)

    def _save(self, trainer: Trainer) -> None:
        update = trainer.global_step
        if update == self._last:
            return
        folder = Path(self.folder or Path(trainer.default_root_dir) / "checkpoints")
        trainer.save_checkpoint(folder / f"update-{update:06d}.ckpt", weights_only=False)  # optimizer state too
        self._last = update
        if trainer.is_global_zero:
            for _, path in checkpoint_files(folder)[self.keep :]:
                remove_checkpoint(path)
