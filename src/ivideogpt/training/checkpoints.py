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
from lightning.pytorch.utilities import rank_zero_warn

from ivideogpt.training.archives import check_archive
from ivideogpt.training.bad_updates import NonFiniteLossError, UpdateJudge
from ivideogpt.training.module import TrainingModule
from ivideogpt.training.sharding import read_sharded_checkpoint, remove_checkpoint, sync

PATTERN = re.compile(r"update-(\d+)\.ckpt")
ASIDE = re.compile(r"update-(\d+)\.ckpt\.(?:unused|diverged)")
PARTIAL = re.compile(r"\.update-(\d+)\.ckpt\.partial")


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
        """Loads ``path``; no pickled code is ever run. Whether it is damaged :func:`read_checkpoint` knows."""
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


def read_checkpoint(path: Path, tensors: bool = True) -> dict[str, Any]:
    """Content of a checkpoint, be it a file or a folder of shards.

    Args:
        path: of the checkpoint.
        tensors: False leaves those of shards on the disk.

    Raises:
        ValueError: if it is damaged, or not the state of a training; torch has other errors for what never was one.
    """
    if path.is_dir():
        state = read_sharded_checkpoint(path, tensors)
    else:
        check_archive(path)
        state = AtomicCheckpointIO().load_checkpoint(path)
    missing = sorted({"state_dict", "optimizer_states", "global_step", "loops"} - state.keys())
    if missing:
        raise ValueError(f"{path} has no {' and no '.join(missing)}")
    return state


def latest_checkpoint(folder: str | os.PathLike[str]) -> tuple[int, Path] | None:
    """Newest checkpoint in ``folder`` that is whole, and its number of updates; None if there is none.

    One that is damaged is skipped with a warning.
    """
    for update, path in checkpoint_files(folder):
        if _is_whole(path, "skipping the checkpoint {}, which does not load: {}"):
            return update, path
    return None


def _is_whole(path: Path, warning: str) -> bool:
    try:
        read_checkpoint(path, tensors=False)
    except Exception as error:  # a damaged archive fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(warning.format(path, reason), stacklevel=3)
        return False
    return True


def set_aside(path: Path, why: str) -> Path:
    """Renames a checkpoint to ``NAME.WHY``, where nothing resumes from it and nothing counts it; the new path."""
    aside = path.with_name(f"{path.name}.{why}")
    remove_checkpoint(aside)
    os.replace(path, aside)
    return aside


class Preempted(SystemExit):
    """The process was asked to end (SIGTERM), has saved the training state, and ends with the usual exit code."""

    def __init__(self, update: int) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.update = update

    def __str__(self) -> str:
        if not self.update:
            return "SIGTERM: nothing is saved yet; the same command begins anew"
        return f"SIGTERM: saved at update {self.update}; the same command goes on from there"


class Checkpoints(Checkpoint):
    """Saves the training state every ``every_n_updates`` updates, at the end, and when the process is asked to end.

    A loss says whether the weights before its update are good, so a checkpoint is proven by the next good update.
    Nothing is saved after a bad update but later, after a good one; nothing older is removed for an unproven
    checkpoint; and one that is not proven when bad updates end the training is set aside (``.ckpt.diverged``). So all
    checkpoints but the newest are proven, and when bad updates ended the training that one is too.

    SIGTERM, which job schedulers send before they kill, may come to any one of the processes; all save the update that
    is under way and exit with code 143.

    Args:
        every_n_updates: distance of two checkpoints; what a kill can cost.
        keep: newest proven checkpoints that stay; two at least make sure that one is whole.
        folder: where they go; ``checkpoints`` in the trainer's root folder if None.
    """

    def __init__(self, every_n_updates: int = 500, keep: int = 2, folder: str | None = None) -> None:
        if every_n_updates < 1 or keep < 1:
            raise ValueError(f"every_n_updates and keep must be positive, got {every_n_updates!r}, {keep!r}")
        self.every_n_updates = every_n_updates
        self.keep = keep
        self.folder = folder
        self._last = -1
        self._unproven: Path | None = None
        self._good_before = 0  # good updates of this run before the last checkpoint
        self._is_due = False
        self._before = -1  # update at which the current batch began
        self._asked = False
        self._handler: Any = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Sets aside what bad updates leave unproven, and stops listening: there is no end of the training."""
        if isinstance(exception, NonFiniteLossError):
            self._settle(trainer, pl_module)
            folder, aside = self._path(trainer, 0).parent, self._unproven
            good = [path for _, path in checkpoint_files(folder) if path != aside]
            left = f"{good[0]} is kept" if good else "No checkpoint is left"
            exception.kept = left + (f"; {aside}, whose weights gave no good loss, is set aside" if aside else "")
            trainer.strategy.barrier()  # so that all have looked
            if aside is not None and trainer.is_global_zero and aside.exists():
                set_aside(aside, "diverged")
            trainer.strategy.barrier()  # who ends first may take the others with it
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def _note(self, number: int, frame: Any) -> None:
        self._asked = True

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Warns where the data's place is not known."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        name = type(data).__qualname__
        if data is not None and name not in checkpoint and data.state_dict():
            rank_zero_warn(f"the checkpoint does not say where {name} stood: its clips begin anew")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes what a resumed run has already saved, clears up what a kill left, and listens for SIGTERM.

        It does so in place of Lightning, whose handler ends without saving and talks to the other processes from
        inside of it. Lightning's own is in place by now, and gone when this one gives way to it at the end.
        """
        self._last, self._asked, self._is_due, self._good_before = trainer.global_step, False, False, 0
        path = self._path(trainer, trainer.global_step)
        names = [*_names(path.parent, PATTERN), *_names(path.parent, ASIDE)]
        later = any(int(match[1]) > trainer.global_step for match in names)
        exists = trainer.strategy.broadcast(path.exists() and not later)
        self._unproven = path if exists else None  # a later one was only saved when this one was proven
        if trainer.is_global_zero:
            _clear_up(path.parent, trainer.global_step)
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
        self._settle(trainer, pl_module)
        every = self.every_n_updates
        self._is_due |= trainer.global_step // every > self._before // every  # some batches make two
        if self._is_due:
            self._save(trainer, pl_module)
        self._end_if_asked(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """A validation can be longer than the time that is left."""
        if trainer.world_size == 1 and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._end_if_asked(trainer, pl_module)  # processes may have other numbers of batches: they wait for its end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the final state, and stops listening."""
        self._save(trainer, pl_module)
        self._stop_listening()  # before Lightning puts back what it found: after that it would undo it

    def _end_if_asked(self, trainer: Trainer, pl_module: LightningModule) -> None:
        asked = self._asked
        if trainer.world_size > 1:
            asked = bool(trainer.strategy.reduce_boolean_decision(asked, all=False))
        if asked:
            self._save(trainer, pl_module)
            raise Preempted(self._last)

    def _path(self, trainer: Trainer, update: int) -> Path:
        folder = Path(self.folder or Path(trainer.default_root_dir) / "checkpoints")
        return folder / f"update-{update:06d}.ckpt"

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        update, judge = trainer.global_step, _judge(pl_module)
        if update == self._last or (judge is not None and judge.bad_in_a_row):
            return
        path = self._path(trainer, update)
        trainer.save_checkpoint(path, weights_only=False)  # optimizer state too
        self._last, self._unproven, self._is_due = update, path, False
        self._good_before = 0 if judge is None else judge.good
        self._remove_older(trainer, max(self.keep, 2))

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Proves the last checkpoint if there was a good update since."""
        judge = _judge(pl_module)
        if self._unproven is not None and (judge is None or judge.good > self._good_before):
            self._unproven = None
            self._remove_older(trainer, self.keep)

    def _remove_older(self, trainer: Trainer, keep: int) -> None:
        if trainer.is_global_zero:
            folder = self._path(trainer, 0).parent
            for _, path in checkpoint_files(folder)[keep:]:
                remove_checkpoint(path)
            for match in _names(folder, ASIDE):
                if int(match[1]) <= trainer.global_step and self._unproven is None:  # trained beyond it
                    remove_checkpoint(folder / match[0])


def _judge(module: LightningModule) -> UpdateJudge | None:
    """Who judges the module's updates; None for modules of others, of which all count as good."""
    return module.update_judge if isinstance(module, TrainingModule) else None


def _names(folder: Path, pattern: re.Pattern[str]) -> list[re.Match[str]]:
    found = [pattern.fullmatch(path.name) for path in folder.glob("*")]
    return [match for match in found if match]


def _clear_up(folder: Path, update: int) -> None:
    """Removes halves of checkpoints, and sets aside what a run from ``update`` cannot use: all that is left counts.

    Had a newer one been whole, the run would have started from it.
    """
    for half in _names(folder, PARTIAL):
        remove_checkpoint(folder / half[0])
    warning = "setting aside the checkpoint {}, which does not load: {}"
    for number, path in checkpoint_files(folder):
        if number > update or (number < update and not _is_whole(path, warning)):
            set_aside(path, "unused")
