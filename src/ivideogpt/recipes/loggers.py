"""Loggers of a stage: the two that every stage has, and those of the recipe, each told where it belongs."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from ivideogpt.recipes.reading import Node
from ivideogpt.training.logs import MetricsCSV


def place_wandb(trainer: Node, folder: Path, recipe: str, stage: str, started: str) -> Node:
    """``trainer`` with its Weights & Biases loggers writing into the stage's folder, under the recipe's name.

    What the recipe says itself stays. A resumed stage goes on with its run, which has the time of its start in its id.

    Raises:
        ValueError: if there is one and the package is not installed.
    """
    loggers = trainer.get("logger")
    nodes: list[Any] = loggers if isinstance(loggers, list) else [loggers]
    if not any(_is_wandb(node) for node in nodes):
        return trainer
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"stages.{stage}.trainer.logger: WandbLogger needs the package wandb: pip install 'ivideogpt[wandb]'"
        )
    folder.mkdir(parents=True, exist_ok=True)
    digits = "".join(character for character in started if character.isdigit())
    own = {"save_dir": str(folder), "project": recipe, "name": stage, "id": f"{recipe}-{stage}-{digits}"}
    placed = copy.deepcopy(nodes)
    for node in placed:
        if _is_wandb(node):
            given = node.get("init_args") or {}
            names = {"dir": "save_dir", "version": "id"}  # other words of the logger for the same
            taken = {names.get(name, name) for name in given}
            node["init_args"] = {name: value for name, value in own.items() if name not in taken} | given
    return {**trainer, "logger": placed}


def _is_wandb(node: Any) -> bool:
    return isinstance(node, dict) and str(node.get("class_path", "")).endswith(".WandbLogger")


def all_loggers(given: Any, folder: Path, step: int) -> list[Any]:
    """``metrics.csv``, TensorBoard and what the recipe has ``given``; none where it says False.

    Args:
        given: the trainer's built ``logger``.
        folder: of the stage.
        step: number of updates that a run logs first; what is there of it and of later ones is dropped.
    """
    if given is False:
        return []
    extra = [] if given in (None, True) else (given if isinstance(given, list) else [given])
    tensorboard = TensorBoardLogger(folder, name="", version="tensorboard", purge_step=step)
    return [tensorboard, *extra, MetricsCSV(folder, step)]  # the last one, so that what it holds, all hold


def finish_wandb() -> None:
    """Ends a run of Weights & Biases, so that the next stage has one of its own; Lightning leaves it open."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()
