"""Resumption: goes on in other processes, workers or accumulated batches than before, and says what that changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from ivideogpt.data.position import PositionDataModule

SHARES = {"processes": "processes", "accumulated": "accumulated batches", "num_workers": "workers of a process"}
"""What may be another number than at the checkpoint: how it is called in the data's state, and to people."""


class Resumption(Callback):
    """Takes the place in the epoch along when the number of accumulated batches changes; tells of changed numbers.

    The trainer counts batches and makes an update when their number divides by the accumulated ones: counted on from
    another number of accumulated batches, the first update would be smaller than the others.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Compares the checkpoint with this run."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.state.fn != TrainerFn.FITTING or not isinstance(data, PositionDataModule):
            return
        before = checkpoint.get(type(data).__qualname__, {})
        if not SHARES.keys() <= before.keys():
            return  # a checkpoint of an earlier version, which does not say
        now = data.state_dict()
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["current"], progress["total"]):
            rescale(counts, before["accumulated"], now["accumulated"])
        line = described(before, now)
        if line is not None and trainer.is_global_zero:
            print(line, flush=True)


def rescale(counts: dict[str, int], before: int, now: int) -> None:
    """Turns a trainer's counts of batches, at the end of an update, into those of batches of another size."""
    begun = counts["processed"] - counts["completed"]  # the batch at whose end the checkpoint was saved
    for name in ("ready", "started", "processed"):
        counts[name] = counts[name] // before * now
    counts["completed"] = counts["processed"] - begun


def described(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """One line on what differs between the data's states before and now, and what follows; None if nothing does."""
    changes = [f"{word} {before[name]} -> {now[name]}" for name, word in SHARES.items() if before[name] != now[name]]
    old, new = (state["processes"] * state["accumulated"] * state["batch_size"] for state in (before, now))
    if not changes and old == new:
        return None
    known = before.get("clips") and now.get("clips")
    other = known and before["clips"] != now["clips"]
    order = "is another one (other training sets or clips)" if other else "is kept"
    update = f"an update takes {new} clips as before" if old == new else f"an update takes {new} clips, {old} before"
    listed = f" with {', '.join(changes)}" if changes else ""
    return f"going on at clip {before['position']}{listed}: the order of clips {order}; {update}"
