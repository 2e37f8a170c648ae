"""Bootstrap over recordings: how far a mean would move had others been drawn from the same source.

Clips of one episode look alike, so whole episodes are drawn, with all their clips. Of few episodes a bootstrap sees too
little spread; its deviations are stretched as Student's distribution is wider than the normal one.

N clips of G episodes, M values of each.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
FEWEST = 5
"""Episodes below which two results are not told apart."""
_AT_ONCE = 4_000_000
"""Counts that are held at once; bounds the memory for many episodes."""
_STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""Student's 97.5 % quantiles for 1 to 30 degrees of freedom."""
_NORMAL = 1.960


def bootstrap_means(
    values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, episodes: Sequence[Hashable] | None = None
) -> np.ndarray:
    """Means (resamples, M) of ``values`` (N, M), each over as many episodes, drawn with replacement, as there are.

    Args:
        values: of the clips.
        resamples: how many means.
        seed: of the drawing.
        episodes: which episode each clip is of (N,); None takes each for one of its own.

    Raises:
        ValueError: if there is no clip.
    """
    if values.ndim != 2 or not len(values):
        raise ValueError(f"a bootstrap needs values (N, M) of at least one video, got shape {values.shape}")
    groups = _groups(len(values), episodes)
    count = int(groups.max()) + 1
    sums, sizes = np.zeros((count, values.shape[1])), np.bincount(groups).astype(np.float64)
    np.add.at(sums, groups, values)
    rng = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // count)
    even = np.full(count, 1 / count)
    means = []
    for first in range(0, resamples, step):
        drawn = rng.multinomial(count, even, size=min(step, resamples - first))
        means.append(drawn @ sums / (drawn @ sizes)[:, None])
    mean = values.mean(0)
    return mean + _stretch(count) * (np.concatenate(means) - mean)


def interval(
    values: np.ndarray,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
    episodes: Sequence[Hashable] | None = None,
) -> np.ndarray:
    """Lower and upper end (2, M) of the interval of the mean of ``values`` (N, M)."""
    tail = (1 - level) / 2
    return np.quantile(bootstrap_means(values, resamples, seed, episodes), [tail, 1 - tail], axis=0)


def num_episodes(episodes: Sequence[Hashable]) -> int:
    """How many different episodes there are."""
    return len(set(episodes))


def _groups(count: int, episodes: Sequence[Hashable] | None) -> np.ndarray:
    if episodes is None:
        return np.arange(count)
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(episode, len(numbers)) for episode in episodes])


def _stretch(count: int) -> float:
    if count < 2:
        return 1.0
    z, free = _NORMAL, count - 1
    quantile = _STUDENT[free - 1] if free <= len(_STUDENT) else z + (z**3 + z) / (4 * free)
    return float(quantile / z * np.sqrt(count / (count - 1)))
