"""Bootstrap over videos: how far a mean would move had other videos been drawn from the same source.

N videos, M values of each.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 10_000
_AT_ONCE = 4_000_000
"""Counts that are held at once; bounds the memory for many videos."""


def bootstrap_means(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means (resamples, M) of ``values`` (N, M), each over N videos that were drawn with replacement.

    Raises:
        ValueError: if there is no video.
    """
    videos = len(values)
    if values.ndim != 2 or not videos:
        raise ValueError(f"a bootstrap needs values (N, M) of at least one video, got shape {values.shape}")
    rng = np.random.default_rng(seed)
    step = max(1, _AT_ONCE // videos)
    even = np.full(videos, 1 / videos)
    means = [
        rng.multinomial(videos, even, size=min(step, resamples - first)) @ values / videos
        for first in range(0, resamples, step)
    ]
    return np.concatenate(means)


def interval(values: np.ndarray, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Lower and upper end (2, M) of the interval of the mean of ``values`` (N, M)."""
    tail = (1 - level) / 2
    return np.quantile(bootstrap_means(values, resamples, seed), [tail, 1 - tail], axis=0)
