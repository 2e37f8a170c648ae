"""EndsEvaluation: a callback that lets SIGTERM end an evaluation at once."""

from __future__ import annotations

import signal
import threading
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from ivideogpt.training.checkpoints import Preempted


class EvaluationPreempted(Preempted):
    """The process was asked to end (SIGTERM) while it was measuring."""

    def __init__(self) -> None:
        super().__init__(0)

    def __str__(self) -> str:
        return "SIGTERM: what was measured is kept; the same command goes on from there"


class EndsEvaluation(Callback):
    """Ends ``trainer.test`` where it is when SIGTERM comes, with exit code 143.

    What an evaluation has measured stands in its journal, which even a kill leaves whole. So there is nothing to wait
    for, as there is in a training; and Lightning's own handler waits for the next batch, of which the last one's end is
    most of the work.
    """

    def __init__(self) -> None:
        self._handler: Any = None
        self._trainer: Trainer | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the place of Lightning's handler, which by now is there."""
        if threading.current_thread() is threading.main_thread():
            self._trainer = trainer
            self._handler = signal.signal(signal.SIGTERM, self._end)

    def _end(self, number: int, frame: Any) -> None:
        assert self._trainer is not None
        signal.signal(number, signal.SIG_IGN)  # not twice; Lightning's, which would come back, waits for the others
        self._handler = None
        launcher: Any = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(number)  # the processes that this one has started
        raise EvaluationPreempted()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signal back."""
        self._stop_listening()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signal back."""
        self._stop_listening()

    def _stop_listening(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None
