"""Mean, spread and range of actions and rewards, added up episode by episode, shard by shard, source by source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

KINDS = ("actions", "rewards")

BySource = dict[str, dict[str, "RunningStats"]]
"""Of each source, for `actions` and `rewards`."""


def add_rows(statistics: BySource, source: str, info: Mapping[str, Any]) -> None:
    """Adds an episode's `actions` and `rewards`, rows (N, D) or None, to those of its source."""
    of_source = statistics.setdefault(source, {kind: RunningStats() for kind in KINDS})
    for kind, stats in of_source.items():
        stats.add(info[kind])


def merge_into(statistics: BySource, others: BySource) -> None:
    """Adds those of another shard."""
    for source, of_source in others.items():
        for kind, stats in statistics.setdefault(source, {kind: RunningStats() for kind in KINDS}).items():
            stats.merge(of_source[kind])


def results(of_source: Mapping[str, RunningStats]) -> dict[str, Any]:
    """What a manifest says of a source."""
    return {kind: stats.result() for kind, stats in of_source.items()}


def overall(statistics: BySource) -> dict[str, Any]:
    """What a manifest says of all sources together; None for what differs in width."""
    total = {kind: RunningStats() for kind in KINDS}
    for of_source in statistics.values():
        for kind, stats in total.items():
            stats.merge(of_source[kind])
    return results(total)


class RunningStats:
    """Mean, spread and range of rows (N, D), added up in float64."""

    def __init__(self) -> None:
        self.count, self.sums, self.squares = 0, np.zeros(0), np.zeros(0)
        self.low, self.high = np.zeros(0), np.zeros(0)
        self.mixed = False

    def add(self, rows: np.ndarray | None) -> None:
        if rows is None or len(rows) == 0 or self.mixed:
            return
        rows = rows.astype(np.float64)
        if self.count == 0:
            self.sums, self.squares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
            self.low, self.high = rows.min(0), rows.max(0)
        elif rows.shape[1] != len(self.sums):
            self.mixed = True  # widths differ within the set: no statistics make sense
            return
        self.count += len(rows)
        self.sums, self.squares = self.sums + rows.sum(0), self.squares + (rows**2).sum(0)
        self.low, self.high = np.minimum(self.low, rows.min(0)), np.maximum(self.high, rows.max(0))

    def merge(self, other: RunningStats) -> None:
        """Adds what another one has added up."""
        if other.mixed or (self.count and other.count and len(self.sums) != len(other.sums)):
            self.mixed = True
        if self.mixed or other.count == 0:
            return
        if self.count == 0:
            self.low, self.high = other.low, other.high
            self.sums, self.squares = np.zeros_like(other.sums), np.zeros_like(other.squares)
        self.count += other.count
        self.sums, self.squares = self.sums + other.sums, self.squares + other.squares
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)

    def state(self) -> dict[str, Any]:
        """All that was added up, as JSON that keeps every bit."""
        arrays = {name: getattr(self, name).tolist() for name in ("sums", "squares", "low", "high")}
        return {"count": self.count, "mixed": self.mixed} | arrays

    @classmethod
    def restored(cls, state: dict[str, Any]) -> RunningStats:
        """What `state` was taken of."""
        stats = cls()
        stats.count, stats.mixed = int(state["count"]), bool(state["mixed"])
        for name in ("sums", "squares", "low", "high"):
            setattr(stats, name, np.asarray(state[name], np.float64))
        return stats

    def result(self) -> dict[str, Any] | None:
        if self.count == 0 or self.mixed:
            return None
        mean = self.sums / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        named = {"mean": mean, "std": std, "min": self.low, "max": self.high}
        return {"count": self.count} | {name: value.tolist() for name, value in named.items()}
