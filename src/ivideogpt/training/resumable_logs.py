"""ResumableLogs: all logs are drawn over the number of updates; a resume neither loses nor doubles what they hold."""

from __future__ import annotations

import time
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector

from ivideogpt.training.logs import MetricsCSV


class _UpdateConnector(_LoggerConnector):
    """Hands metrics to the loggers at the number of updates, where Lightning counts batches that ended one.

    The two differ where a batch makes several updates, or none (manual optimization). A metric named "step" would
    override Lightning's number, but not the choice of the batches that are logged, and would stand among the metrics.
    """

    _before = 0  # updates when the current batch began
    epoch: int | None = None  # of a checkpoint at the end of one, which Lightning counts as done when it goes on

    @property
    def is_due(self) -> bool:
        """Whether the current batch made the update that is logged, ``log_every_n_steps`` after the last one."""
        done = self.trainer.global_step
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if done == self._before or not every:
            return False
        return bool(done // every > self._before // every or self.trainer.should_stop)

    def on_batch_start(self, batch: Any, dataloader_idx: int | None = None) -> None:
        """Notes the update that the batch begins at."""
        if self.trainer.training:
            self._before, self.epoch = self.trainer.global_step, None
            self._align()
        super().on_batch_start(batch, dataloader_idx)

    def update_train_step_metrics(self) -> None:
        """Logs the metrics of a batch."""
        if self.is_due:
            self.log_metrics(self.metrics["log"])

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Logs ``metrics`` at the number of updates if no ``step`` is given."""
        self._align()
        if metrics and step is None and self.epoch is not None:
            metrics = {**metrics, "epoch": self.epoch}
        super().log_metrics(metrics, step)
        self._logged_metrics.pop("epoch", None)

    def _align(self) -> None:
        # this number is what Lightning, its monitors of learning rates and devices included, logs at
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step


class ResumableLogs(Callback):
    """Keeps the logs of a stage whole over all of its starts.

    A checkpoint is saved before its update is logged and validated. What a kill then keeps from the logs is in the
    checkpoint, or computed by a validation when the training goes on. ``metrics.csv`` has to be the last logger: what
    it holds, all hold.
    """

    def __init__(self) -> None:
        self.begin = time.monotonic()
        """When this start began."""
        self.trained = False
        """Whether this start has trained at all: not if its checkpoint is of the last update."""
        self._earlier = 0.0
        self._due: dict[str, Any] = {"row": {}, "validates": False, "epoch": 0}
        self._owed: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Time of all starts; of an earlier one up to the checkpoint that was gone on from."""
        return self._earlier + time.monotonic() - self.begin

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the place of what hands metrics to the loggers."""
        if not isinstance(trainer._logger_connector, _UpdateConnector):
            trainer._logger_connector = _UpdateConnector(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes what will be logged of this update."""
        connector, fit_loop = trainer._logger_connector, trainer.fit_loop
        assert isinstance(connector, _UpdateConnector) and fit_loop._data_fetcher is not None
        self._due = {
            "row": dict(convert_tensors_to_scalars(connector.metrics["log"])) if connector.is_due else {},
            "validates": fit_loop.epoch_loop._should_check_val_fx(fit_loop._data_fetcher),
            "epoch": trainer.current_epoch,
        }

    def state_dict(self) -> dict[str, Any]:
        """Time, and what the logs will get of the update that is saved."""
        return {"seconds": self.seconds, **self._due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self._earlier = state_dict["seconds"]
        self._owed = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what a resumed run's checkpoint owes to the logs."""
        self.trained = True
        if not self.settle(trainer):
            return
        connector, val_loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
        first = connector._first_loop_iter
        val_loop.restarting = False
        trainer.validating = True
        val_loop.run()
        trainer.training = True
        connector._first_loop_iter = first

    def settle(self, trainer: Trainer) -> bool:
        """Brings the rows of the update that the run stands at in order; whether its validation is still to be done.

        A checkpoint of the last update starts no training, and so no :meth:`on_train_start`.
        """
        owed, self._owed = self._owed, None
        table = next((logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)), None)
        if owed is None or table is None:
            return False
        update, row, connector = trainer.global_step, owed["row"], trainer._logger_connector
        assert isinstance(connector, _UpdateConnector)
        connector.epoch = owed["epoch"]
        held = set(trainer.strategy.broadcast(sorted(table.names_at(update))))
        if not owed["validates"]:  # what is there of one belongs to a later batch of no update of its own
            table.drop_at(update, but=row.keys())
        if row and not held & row.keys():
            connector.log_metrics(row)
        return bool(owed["validates"]) and not held - row.keys()
