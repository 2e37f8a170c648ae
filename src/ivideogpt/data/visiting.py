"""The order in which the episodes of a set are visited: pure functions of a seed and a number.

Of a set on the disk any episode is as near as any other, so a pass is one permutation. Of a set behind a URL whole
shards are fetched: a pass takes them in random order, a window of a few at a time, and mixes the episodes within a
window. At any moment only a window's shards are needed, and which ones come next is known.
"""

from __future__ import annotations

import numpy as np


class VisitingOrder:
    """The order of one set.

    Args:
        members: Numbers of its episodes, any numbers, int64 (N,).
        shards: Number of the shard that each lies in, int (N,).
        window: Shards whose episodes are mixed; None: all.
        stream: A number that makes the order another one than that of other sets.
    """

    def __init__(self, members: np.ndarray, shards: np.ndarray, window: int | None, stream: int) -> None:
        self.members, self.shards, self.window, self.stream = members, shards, window, stream
        self._pass: tuple[tuple[int, int], _Pass] | None = None  # the one used last

    def __len__(self) -> int:
        return len(self.members)

    def exact(self, seed: int, number: int) -> int:
        """Episode that visit `number` is to, where each pass visits every episode once."""
        turn, slot = divmod(number, len(self))
        return int(self._at(seed, turn).order[slot])

    def near(self, seed: int, number: int, rng: np.random.Generator) -> int:
        """An episode of the window that visit `number` falls into, drawn with `rng`."""
        turn, slot = divmod(number, len(self))
        visited = self._at(seed, turn)
        window = visited.window_of(slot)
        return int(visited.order[rng.integers(visited.begins[window], visited.begins[window + 1])])

    def upcoming(self, seed: int, number: int) -> tuple[tuple[int, int], list[int]]:
        """Which window visit `number` falls into, and the shards of this one and the next, in the order of need."""
        turn, slot = divmod(number, len(self))
        visited = self._at(seed, turn)
        window = visited.window_of(slot)
        return (turn, window), [shard for shards in visited.shards[window : window + 2] for shard in shards]

    def _at(self, seed: int, turn: int) -> _Pass:
        if self._pass is None or self._pass[0] != (seed, turn):
            rng = np.random.default_rng([seed, turn, 7, self.stream])
            self._pass = (seed, turn), _Pass(self.members, self.shards, self.window, rng)
        return self._pass[1]


class _Pass:
    """One pass: `order` (N,) of the episodes, where each window `begins` (W + 1,), and the `shards` of each."""

    def __init__(self, members: np.ndarray, shards: np.ndarray, window: int | None, rng: np.random.Generator) -> None:
        numbers = rng.permutation(np.unique(shards))
        size = window or len(numbers)
        self.shards = [numbers[first : first + size].tolist() for first in range(0, len(numbers), size)]
        window_of_shard = np.zeros(int(numbers.max()) + 1, np.int64)
        window_of_shard[numbers] = np.arange(len(numbers)) // size
        windows = window_of_shard[shards]
        shuffled = rng.permutation(len(members))
        self.order = members[shuffled[np.argsort(windows[shuffled], kind="stable")]]
        self.begins = np.concatenate([[0], np.cumsum(np.bincount(windows, minlength=len(self.shards)))])

    def window_of(self, slot: int) -> int:
        """Window that a slot lies in."""
        return int(np.searchsorted(self.begins, slot, side="right")) - 1


def interleaved(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Takes turns between sets so that each is spread evenly: which set comes at each slot, and its how-manieth visit.

    Args:
        lengths: Episodes of each set; N together.

    Returns:
        Two arrays int64 (N,).
    """
    sets = np.repeat(np.arange(len(lengths)), lengths)
    visits = np.concatenate([np.arange(length) for length in lengths])
    order = np.argsort((visits + 0.5) / np.array(lengths)[sets], kind="stable")
    return sets[order], visits[order]
