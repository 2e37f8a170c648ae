"""Mean, spread and range of actions and rewards, added up episode by episode, shard by shard, source by source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
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


def action_statistics(
    manifests: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, float] | None = None,
    source: str = "*",
    but: Sequence[str] = (),
) -> dict[str, list[float]]:
    """Mean and standard deviation of each action dimension over shard sets, as a transformer normalises by them.

    Args:
        manifests: of the sets by name.
        weights: shares of the sets in a mixture; None: by their actions.
        source: only of sources of this name or pattern.
        but: names or patterns of which none may fit.

    Returns:
        ``action_mean`` and ``action_std``; a dimension that never changes has 1 there, so that it stays 0.

    Raises:
        ValueError: there are no statistics, or widths differ.
    """

    def fits(name: str) -> bool:
        return fnmatchcase(name, source) and not any(fnmatchcase(name, other) for other in but)

    rows = []
    for name, manifest in manifests.items():
        found = [(s, entry) for s, entry in manifest["sources"].items() if fits(s)]
        whole = len(found) == len(manifest["sources"])
        stats = [manifest["statistics"]["actions"]] if whole else [
            entry.get("statistics", {}).get("actions") for _, entry in found
        ]  # fmt: skip
        stats = [entry for entry in stats if entry is not None]
        total = sum(entry["count"] for entry in stats)
        share = total if weights is None else weights[name]
        rows += [(share * entry["count"] / total, entry["mean"], entry["std"]) for entry in stats]
    widths = sorted({len(mean) for _, mean, _ in rows})
    if len(widths) != 1:
        what = f"their widths differ: {widths}" if widths else "there are no statistics of actions"
        raise ValueError(f"actions of {', '.join(manifests)} cannot be normalised: {what} (sources {source!r})")
    parts = np.array([share for share, _, _ in rows])[:, None]
    means, stds = (np.array([row[i] for row in rows], np.float64) for i in (1, 2))
    mean = (parts * means).sum(0) / parts.sum()
    std = np.sqrt(np.maximum((parts * (stds**2 + means**2)).sum(0) / parts.sum() - mean**2, 0))
    std[std <= 1e-6 * np.maximum(1.0, np.abs(mean))] = 1.0
    return {"action_mean": mean.tolist(), "action_std": std.tolist()}


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
