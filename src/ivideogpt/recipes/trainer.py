"""The trainer of a stage, and how it is interrupted."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, WeightAveraging
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from ivideogpt.recipes.checking import build_arguments
from ivideogpt.recipes.loggers import all_loggers
from ivideogpt.recipes.reading import Node
from ivideogpt.training.callbacks import SeededUpdates
from ivideogpt.training.checkpoints import AtomicCheckpointIO, Checkpoints, Preempted, latest_checkpoint
from ivideogpt.training.preemption import EndsEvaluation
from ivideogpt.training.progress import UpdateProgress
from ivideogpt.training.resumable_logs import ResumableLogs
from ivideogpt.training.resumption import Resumption


def build_trainer(settings: Node, where: str, folder: Path, seed: int) -> tuple[Trainer, Path | None]:
    """The stage's trainer, and the checkpoint that it goes on from.

    Args:
        settings: its arguments, checked.
        where: the place of the stage in the recipe.
        folder: of the stage.
        seed: of the recipe.

    Raises:
        ValueError: if Lightning refuses a setting.
    """
    kwargs = build_arguments(Trainer, settings, f"{where}.trainer", skip=("default_root_dir",))
    found = latest_checkpoint(folder / "checkpoints")
    step = 0 if found is None else found[0] + 1  # rows of the checkpoint's own update stay
    callbacks = kwargs.pop("callbacks", None) or []
    callbacks = [*(callbacks if isinstance(callbacks, list) else [callbacks]), SeededUpdates(seed)]
    callbacks += [Resumption(), EndsEvaluation()]
    if not any(isinstance(callback, Checkpoints) for callback in callbacks):
        callbacks.append(Checkpoints())
    own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
    if kwargs.get("enable_progress_bar") is not False and not own_bar:
        callbacks.append(UpdateProgress(where.rpartition(".")[2]))
    callbacks.append(ResumableLogs())  # behind all others that log
    loggers = all_loggers(kwargs.pop("logger", None), folder, step)
    plugins = kwargs.pop("plugins", None) or []
    plugins = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
    if "num_sanity_val_steps" not in settings:
        kwargs["num_sanity_val_steps"] = 0
    if "enable_model_summary" not in settings:
        kwargs["enable_model_summary"] = False
    try:
        trainer = Trainer(**kwargs, default_root_dir=folder, callbacks=callbacks, logger=loggers, plugins=plugins)
    except (MisconfigurationException, ValueError) as error:
        raise ValueError(f"{where}.trainer: {error}") from error
    return trainer, None if found is None else found[1]


def count_processes(settings: Node, where: str) -> int:
    """How many processes a trainer of these settings uses, on all machines together.

    Raises:
        ValueError: if Lightning refuses them, for example for want of a GPU.
    """
    names = ("accelerator", "devices", "num_nodes", "strategy", "precision")
    chosen: Node = {name: settings[name] for name in names if name in settings}
    kwargs = build_arguments(Trainer, chosen, f"{where}.trainer")
    kwargs |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        trainer = Trainer(**kwargs)
    except (MisconfigurationException, ValueError) as error:
        raise ValueError(f"{where}.trainer: {error}") from error
    return trainer.num_devices * trainer.num_nodes


def take_averages(trainer: Trainer, module: LightningModule) -> None:
    """Takes over averaged weights where the checkpoint is of the last update: Lightning then ends no training."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback.on_train_end(trainer, module)


@contextlib.contextmanager
def interrupts_raised(trainer: Trainer) -> Iterator[None]:
    """Turns the silent exit that Lightning makes of Ctrl-C back into a KeyboardInterrupt, and SIGTERM into code 143."""
    handler = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    except Preempted as ended:
        if trainer.is_global_zero:
            print(ended, file=sys.stderr)
        raise
    except SIGTERMException as error:  # it came before our own handler was in place
        raise SystemExit(128 + signal.SIGTERM) from error
    except SystemExit as error:
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        if handler is not None:
            signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error
