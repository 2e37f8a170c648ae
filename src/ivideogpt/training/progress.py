"""UpdateProgress: a rich progress bar over a stage's updates, with an ETA that holds after a resume."""

from __future__ import annotations

import math
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text


class UpdateProgress(ProgressBar):
    """One line for the whole training: updates done, elapsed and remaining time, the newest metrics.

    The remaining time counts the updates of this start only, so a resumed run does not look faster than it is. Where
    the output is no terminal, a plain line is printed now and then.

    Args:
        description: what stands in front, such as the stage's name.
        plain_seconds: distance of two plain lines.
    """

    def __init__(self, description: str = "training", plain_seconds: float = 30.0) -> None:
        super().__init__()
        self.description = description
        self.plain_seconds = plain_seconds
        self.enabled = True
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._console = Console()
        self._start, self._start_update, self._last_line = 0.0, 0, 0.0
        self._total: int | None = None  # of a training for a time

    def enable(self) -> None:
        """Shows the bar."""
        self.enabled = True

    def disable(self) -> None:
        """Hides the bar (Lightning does so on all processes but the first)."""
        self.enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the display at the update that the run stands at."""
        updates = trainer.estimated_stepping_batches
        self._open(trainer.global_step, None if math.isinf(updates) else int(updates))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the display on."""
        self._advance(trainer, trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says that a validation is running."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, state="validating")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Closes the display."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Closes the display, so that the error stands below it."""
        self._close()

    def _open(self, done: int, total: int | None) -> None:
        self._start, self._start_update, self._total = time.monotonic(), done, total
        self._last_line = self._start
        if not self.enabled:
            return
        if not self._console.is_terminal:
            resumed = f", going on at {done}" if done else ""
            updates = "updates for a time" if total is None else f"{total} updates"
            self._console.print(f"{self.description}: {updates}{resumed}", highlight=False)
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("updates"),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            TextColumn("{task.fields[state]}"),
            console=self._console,
        )
        self._task = self._progress.add_task(self.description, total=total, completed=done, eta="?", state="")
        self._progress.start()

    def _advance(self, trainer: Trainer, done: int) -> None:
        if not self.enabled:
            return
        now = time.monotonic()
        if self._total is None:
            eta = format_seconds(_remaining_time(trainer))
        else:
            eta = format_seconds(remaining_seconds(self._start_update, done, self._total, now - self._start))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, eta=eta, state=_metrics(trainer))
        elif now - self._last_line >= self.plain_seconds or done == self._total:
            self._last_line = now
            elapsed = format_seconds(now - self._start)
            updates = f"{done}" if self._total is None else f"{done}/{self._total}"
            line = f"{self.description}: {updates} updates, {elapsed}, ETA {eta}, {_metrics(trainer)}"
            self._console.print(Text(line), soft_wrap=True)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None


def remaining_seconds(start: int, done: int, total: int, elapsed: float) -> float | None:
    """Seconds that ``total - done`` updates will take at the pace since ``start``; None before the first one."""
    if done <= start:
        return None
    return (total - done) * elapsed / (done - start)


def _remaining_time(trainer: Trainer) -> float | None:
    """Seconds that are left of the trainer's ``max_time``; None where there is none."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer):
            return callback.time_remaining()
    return None


def format_seconds(seconds: float | None) -> str:
    """``h:mm:ss``, or ``?`` for None."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _metrics(trainer: Trainer) -> str:
    shown = [name for name in ("train/loss", "val/loss", "val/psnr") if name in trainer.callback_metrics]
    return " ".join(f"{name} {float(trainer.callback_metrics[name]):.4g}" for name in shown)
