"""How many clips an update of a stage takes: checked before anything runs, and compared between two starts."""

from __future__ import annotations

import torch

from ivideogpt.data.position import BATCH_SIZE, share_of
from ivideogpt.recipes.reading import Node

SHARES = {"trainer": ("devices", "num_nodes", "accumulate_grad_batches"), "module": ("accumulate",)}
"""Settings that share an update's clips out over processes and batches, ..."""

SIZES = ("batch_size", "global_batch_size")
"""... and those of the data that say how many there are."""

WHOLE = (None, "auto", "ddp")
"""Strategies that keep whole weights on each process, and so change nothing but the rounding either."""


def processes(trainer: Node) -> int:
    """Processes that a trainer of these settings makes, all machines together.

    By the settings alone: they may be of an earlier start on another machine, of which no trainer can be built here.
    """
    devices = trainer.get("devices") or "auto"
    if devices in ("auto", -1, "-1"):
        number = torch.cuda.device_count() if trainer.get("accelerator", "auto") != "cpu" else 1
    elif isinstance(devices, str) and "," in devices:
        number = len([index for index in devices.split(",") if index.strip()])
    else:
        number = len(devices) if isinstance(devices, list) else int(devices)
    return max(number, 1) * (trainer.get("num_nodes") or 1)


def accumulated(stage: Node) -> int:
    """Batches of an update in each process, of a stage of these settings."""
    by_module = stage["module"].get("init_args", {}).get("accumulate") or 1
    return (stage["trainer"].get("accumulate_grad_batches") or 1) * by_module


def clips_of_update(stage: Node) -> int | None:
    """Clips of an update over all processes and accumulated batches; None where the data do not say."""
    data = stage["data"].get("init_args", {})
    if not any(name in data for name in SIZES):
        return None
    if data.get("global_batch_size") is not None:
        return int(data["global_batch_size"])
    return (data.get("batch_size") or BATCH_SIZE) * processes(stage["trainer"]) * accumulated(stage)


def check_batch(stage: Node, where: str) -> None:
    """Refuses a global batch that does not divide by the processes and accumulated batches.

    Raises:
        ValueError: with both numbers.
    """
    clips = stage["data"]["init_args"].get("global_batch_size")
    if clips is not None:
        try:
            share_of(clips, processes(stage["trainer"]), accumulated(stage))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
