"""MetricsCSV: a Lightning logger that appends to one metrics.csv and goes on where a resumed run stopped."""

from __future__ import annotations

import csv
import os
from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

FILE_NAME = "metrics.csv"
PLACES = ("step", "epoch")
"""Columns that say where a row belongs, and are no metrics."""


class MetricsCSV(Logger):
    """One row a logging step, one column a metric; Lightning's own CSV logger deletes the file of an earlier start.

    Args:
        folder: where ``metrics.csv`` goes.
        resume_step: first step that will be logged again; rows from it on are dropped.
    """

    def __init__(self, folder: str | os.PathLike[str], resume_step: int = 0) -> None:
        super().__init__()
        self.path = Path(folder) / FILE_NAME
        self.resume_step = resume_step
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """Of the logger; it has one file only."""
        return "csv"

    @property
    def version(self) -> str:
        """Of the run; it has one only."""
        return ""

    @property
    def save_dir(self) -> str:
        """Folder of the file."""
        return str(self.path.parent)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved recipe lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends one row; a new metric rewrites the file with one column more."""
        if self._columns is None:
            self._columns = self._reopen()
        row = {"step": str(step), **{name: f"{float(value):.6g}" for name, value in metrics.items()}}
        fresh = sorted(name for name in row if name not in self._columns)
        if fresh:
            rows = self._read()
            self._columns += fresh
            self._write(rows)
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def names_at(self, step: int) -> set[str]:
        """Metrics that the file has of ``step``."""
        rows = [row for row in self._read() if int(row["step"]) == step]
        return {name for row in rows for name, value in row.items() if value and name not in PLACES}

    @rank_zero_only
    def drop_at(self, step: int, but: Collection[str]) -> None:
        """Takes out the rows of ``step`` that have none of the metrics ``but``."""
        if self._columns is None:
            self._columns = self._reopen()
        rows = self._read()
        self._write([row for row in rows if int(row["step"]) != step or any(row.get(name) for name in but)])

    def last_values(self) -> dict[str, float]:
        """The newest value of each metric."""
        rows = self._read()
        return {name: float(value) for row in rows for name, value in row.items() if value and name not in PLACES}

    def _reopen(self) -> list[str]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return ["step"]
        rows = self._read()
        self._columns = list(rows[0]) if rows else ["step"]
        self._write([row for row in rows if int(row["step"]) < self.resume_step])
        return self._columns

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="", encoding="utf-8") as file:
            lines = file.readlines()
        if lines and not lines[-1].endswith("\n"):  # a kill or a full disk has cut the last row off
            lines.pop()
        rows = csv.DictReader(lines, restval="")
        return [{k: v for k, v in row.items() if k} for row in rows if (row.get("step") or "").isdigit()]

    def _write(self, rows: list[dict[str, str]]) -> None:
        assert self._columns is not None
        partial = self.path.with_suffix(".partial")
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)
