"""Judges updates by their losses and gradients: bad ones are left out, and too many in a row end the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from warnings import warn

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class NonFiniteLossError(ValueError):
    """Too many updates had a loss that is NaN, infinite or above its limit, or gradients that are not finite.

    Args:
        what: happened, in a sentence without its full stop.
    """

    kept = "No checkpoint was saved"
    """What the next start goes on from; who saves checkpoints says it here."""

    def __init__(self, what: str) -> None:
        super().__init__(what)

    def __str__(self) -> str:
        return (
            f"{self.args[0]}. {self.kept}. A lower learning_rate, a longer warm-up or float32 "
            f"(trainer.precision=32-true) usually helps"
        )


class UpdateJudge:
    """Counts good and bad updates. An update is bad on all processes where it is bad on one.

    Args:
        max_bad_updates: bad ones in a row that are left out before the training ends.
        loss_limit: a larger loss is bad; None for none.
    """

    def __init__(self, max_bad_updates: int, loss_limit: float | None) -> None:
        self.max_bad_updates, self.loss_limit = max_bad_updates, loss_limit
        self.restart()

    def restart(self) -> None:
        """Begins a run. A checkpoint is only ever saved after a good update, so there is nothing to resume."""
        self.bad_in_a_row = 0
        self.good = 0
        self._noted: list[tuple[Tensor, list[Any]]] = []

    def note(self, loss: Tensor, keys: Sequence[Any]) -> None:
        """Remembers a loss that the update under way comes from, and the keys of its clips."""
        self._noted.append((loss.detach().float(), list(keys)))

    def judge(self, norms: Sequence[Tensor], trainer: Trainer) -> bool:
        """Whether the update may change the weights: one wait for the device, after its backward passes were started.

        Args:
            norms: of its gradients.
            trainer: whose processes decide together.

        Raises:
            NonFiniteLossError: on all processes, after ``max_bad_updates`` bad ones in a row, naming the clips.
        """
        noted, self._noted = self._noted, []
        numbers = [*(loss for loss, _ in noted), *norms]
        values = torch.stack(numbers).tolist() if numbers else []
        report = self._report(values[: len(noted)], values[len(noted) :], [keys for _, keys in noted])
        several = trainer.world_size > 1
        bad = report is not None
        if several:
            bad = bool(trainer.strategy.reduce_boolean_decision(bad, all=False))
        if not bad:
            self.bad_in_a_row = 0
            self.good += 1
            return True
        self.bad_in_a_row += 1
        process = ""
        if several:
            reports: list[str | None] = [None] * trainer.world_size
            torch.distributed.all_gather_object(reports, report)
            rank, report = next((rank, each) for rank, each in enumerate(reports) if each is not None)
            process = f" on process {rank}"
        assert report is not None
        what = report.replace("@", f"{process} at update {trainer.global_step}", 1)
        if self.bad_in_a_row > self.max_bad_updates:
            raise NonFiniteLossError(what)
        if trainer.is_global_zero:
            warn(f"{what}: left out, {self.bad_in_a_row} of at most {self.max_bad_updates} in a row", stacklevel=2)
        return False

    def _report(self, losses: Sequence[float], norms: Sequence[float], keys: Sequence[list[Any]]) -> str | None:
        """What is bad, with a mark where place and time belong; None if nothing is."""
        limit = math.inf if self.loss_limit is None else self.loss_limit
        bad = [place for place, loss in enumerate(losses) if not (math.isfinite(loss) and loss <= limit)]
        if bad:
            above = "" if self.loss_limit is None else f" (loss_limit is {self.loss_limit:g})"
            clips = [key for place in bad for key in keys[place]]
            return f"train/loss is {losses[bad[0]]}{above}@, in the batch of clips {clips}"
        infinite = [norm for norm in norms if not math.isfinite(norm)]
        if infinite:
            clips = [key for each in keys for key in each]
            return f"train/gradient_norm is {infinite[0]}@, in the batch of clips {clips}"
        return None
