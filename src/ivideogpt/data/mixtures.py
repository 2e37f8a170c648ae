"""Shard sets joined into one source of episodes, in equal shares by episode or by weight.

Which episode clip number `position` comes from is a pure function of (seed, position). Without weights every pass over
the mixture visits each episode once, in an order of its own; with weights each clip draws its set by weight, then an
episode of it. Where a set is behind a URL, the episodes come in the order of `visiting`, so that few shards are needed
at a time: without weights still each once a pass, the sets evenly spread; with weights an episode of the window of
shards that the set has come to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ivideogpt.data.choices import chosen
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.remote import RemoteShards
from ivideogpt.data.visiting import VisitingOrder, interleaved

DEFAULT_WINDOW = 8


class Mixture:
    """Shard sets with optional weights.

    Args:
        sets: Shard sets by name.
        weights: Share of the clips for each name, any positive scale; None: proportional to the episodes.
        episodes: (set name, episode number) pairs to use; None uses all. For splits.
        window: Shards of a set behind a URL whose episodes are mixed.

    Raises:
        ValueError: No set, a weight for an unknown set, a set without a weight, or a weight that is not positive.
    """

    def __init__(
        self,
        sets: Mapping[str, ShardSet],
        weights: Mapping[str, float] | None = None,
        episodes: Sequence[tuple[str, int]] | None = None,
        window: int = DEFAULT_WINDOW,
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
        self.remote = [name for name, shards in self.sets.items() if isinstance(shards.files, RemoteShards)]
        self._orders = self._visiting_orders(window) if self.remote else {}
        in_turns = self.remote and self.weights is None
        self._turns = interleaved([len(order) for order in self._orders.values()]) if in_turns else None
        self.window = window
        self._seen: dict[str, tuple[int, int]] = {}  # window of each remote set that was visited last

    def _visiting_orders(self, window: int) -> dict[str, VisitingOrder]:
        orders = {}
        for stream, (name, shards) in enumerate(self.sets.items()):
            members = np.array(self._by_set[name], np.int64)
            rows = np.array([self.episodes[member][1] for member in self._by_set[name]], np.int64)
            mixed = window if name in self.remote else None
            orders[name] = VisitingOrder(members, shards.index["shard"][rows], mixed, stream)
        return {name: order for name, order in orders.items() if len(order)}

    def __len__(self) -> int:
        return len(self.episodes)

    def draw(self, seed: int, position: int) -> int:
        """Number in `episodes` of the episode that clip `position` comes from."""
        if self.weights is None and self.remote:
            name, number = self._visit(position)
            return self._orders[name].exact(seed, number)
        if self.weights is None:
            turn, slot = divmod(position, len(self.episodes))
            if self._pass is None or self._pass[0] != (seed, turn):
                self._pass = (seed, turn), np.random.default_rng([seed, turn, 1]).permutation(len(self.episodes))
            return int(self._pass[1][slot])
        rng = np.random.default_rng([seed, position, 2])
        names = list(self.weights)
        name = names[rng.choice(len(names), p=list(self.weights.values()))]
        if name in self.remote:
            return self._orders[name].near(seed, int(position * self.weights[name]), rng)
        members = self._by_set[name]
        return members[int(rng.integers(len(members)))]

    def _visit(self, position: int) -> tuple[str, int]:
        """Set that a position falls to, and its how-manieth visit over all passes."""
        assert self._turns is not None
        sets, visits = self._turns
        turn, slot = divmod(position, len(self))
        name = list(self._orders)[sets[slot]]
        return name, turn * len(self._orders[name]) + int(visits[slot])

    def check_room(self, limit: float) -> None:
        """Raises ValueError where two windows of every remote set together do not fit into `limit` bytes."""
        needed = 0
        for name in self.remote:
            sizes = sorted((shard["size"] for shard in self.sets[name].manifest["shards"]), reverse=True)
            needed += sum(sizes[: 2 * self.window])
        if needed > limit:
            raise ValueError(
                f"the cache may hold {limit / 1e9:g} GB, and two windows of {self.window} shards of each set behind a "
                f"URL have {needed / 1e9:.3g}: raise cache_gigabytes or lower window_shards"
            )

    def upcoming(self, seed: int, position: int) -> Iterator[tuple[str, list[int]]]:
        """Remote sets that have come to another window of shards, and the shards that they need now and next."""
        if self.weights is None:
            numbers = dict([self._visit(position)]) if self.remote else {}
        else:
            numbers = {name: int(position * self.weights[name]) for name in self.remote}
        for name, number in numbers.items():
            if name in self.remote:
                window, shards = self._orders[name].upcoming(seed, number)
                if self._seen.get(name) != window:
                    self._seen[name] = window
                    yield name, shards


def of_cameras(sets: Mapping[str, ShardSet], camera: Mapping[str, str]) -> list[tuple[str, int]]:
    """(set name, episode number) of the episodes of the cameras chosen by source; all of sources that are not named.

    Raises:
        ValueError: A source has no such camera; the message lists those that it has.
    """
    episodes: list[tuple[str, int]] = []
    for name, shards in sets.items():
        columns, index = np.stack([shards.index["source"], shards.index["camera"]]), shards.index
        kept = np.ones(len(shards), bool)
        for number, source in enumerate(index.sources):
            wanted, of_source = chosen(camera, source, None), columns[0] == number
            if wanted is None or not of_source.any():
                continue
            fits = np.array([camera_name == wanted for camera_name in index.cameras], bool)[columns[1]]
            if not fits[of_source].any():
                there = [index.cameras[i] for i in np.unique(columns[1][of_source])]
                raise ValueError(f"{source} in {name} has no camera {wanted!r}; it has {', '.join(map(repr, there))}")
            kept &= ~of_source | fits
        episodes += [(name, int(row)) for row in np.flatnonzero(kept)]
    return episodes


def recordings_of(mixture: Mixture) -> list[int]:
    """Number of each episode's recording, in the order of the mixture; cameras of one recording share it."""
    known: dict[tuple[str, int], int] = {}
    cameras: dict[str, set[int]] = {name: set() for name in mixture.sets}
    for name, index in mixture.episodes:
        cameras[name].add(int(mixture.sets[name].index["camera"][index]))
    several = [name for name, used in cameras.items() if len(used) > 1]
    for name in several:
        if name in mixture.remote:
            raise ValueError(
                f"{name} has several cameras, and to tell which episodes are of one recording all of it would be "
                "fetched: choose a camera, or name sets to validate on"
            )
    numbers = {name: mixture.sets[name].recordings() for name in several}
    return [
        known.setdefault((name, numbers[name][index] if name in numbers else index), len(known))
        for name, index in mixture.episodes
    ]


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
