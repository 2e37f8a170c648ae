"""Shard sets joined into one source of episodes, in equal shares by episode or by weight.

Which episode clip number `position` comes from is a pure function of (seed, position). Without weights every pass over
the mixture visits each episode once, in an order of its own; with weights each clip draws its set by weight, then an
episode of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ivideogpt.data.reader import ShardSet


class Mixture:
    """Shard sets with optional weights.

    Args:
        sets: Shard sets by name.
        weights: Share of the clips for each name, any positive scale; None: proportional to the episodes.
        episodes: (set name, episode number) pairs to use; None uses all. For splits.

    Raises:
        ValueError: No set, a weight for an unknown set, a set without a weight, or a weight that is not positive.
    """

    def __init__(
        self,
        sets: Mapping[str, ShardSet],
        weights: Mapping[str, float] | None = None,
        episodes: Sequence[tuple[str, int]] | None = None,
    ) -> None:
        if not sets:
            raise ValueError("a mixture needs at least one shard set")
        self.sets = dict(sets)
        if episodes is None:
            episodes = [(name, index) for name, shards in self.sets.items() for index in range(len(shards))]
        self.episodes = list(episodes)
        if not self.episodes:
            raise ValueError("the mixture holds no episode")
        self.weights = None if weights is None else check_weights(weights, list(self.sets))
        self._by_set = {name: [i for i, (of, _) in enumerate(self.episodes) if of == name] for name in self.sets}
        empty = [name for name, members in self._by_set.items() if not members]
        if self.weights is not None and empty:
            raise ValueError(f"set {empty[0]!r} has a weight but no episode")
        self._pass: tuple[tuple[int, int], np.ndarray] | None = None  # the order of the pass used last

    def __len__(self) -> int:
        return len(self.episodes)

    def draw(self, seed: int, position: int) -> int:
        """Number in `episodes` of the episode that clip `position` comes from."""
        if self.weights is None:
            turn, slot = divmod(position, len(self.episodes))
            if self._pass is None or self._pass[0] != (seed, turn):
                self._pass = (seed, turn), np.random.default_rng([seed, turn, 1]).permutation(len(self.episodes))
            return int(self._pass[1][slot])
        rng = np.random.default_rng([seed, position, 2])
        names = list(self.weights)
        members = self._by_set[names[rng.choice(len(names), p=list(self.weights.values()))]]
        return members[int(rng.integers(len(members)))]


def check_weights(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Weights in the order of `names`, scaled to add up to 1.

    Raises:
        ValueError: The names differ, or a weight is not a positive finite number.
    """
    unknown, missing = sorted(set(weights) - set(names)), sorted(set(names) - set(weights))
    if unknown or missing:
        raise ValueError(f"weights do not fit the sets: unknown {unknown}, missing {missing}")
    for name, weight in weights.items():
        if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight of {name!r} must be a positive number, got {weight!r}")
    total = sum(weights.values())
    return {name: weights[name] / total for name in names}
