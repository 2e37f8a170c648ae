"""Comparison of two results: whether their difference is larger than chance, by a paired bootstrap over episodes.

Both models were measured on the same videos, so the difference is taken video by video, which removes what makes some
videos harder than others. N videos, M metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ivideogpt.metrics.bootstrap import FEWEST, LEVEL, RESAMPLES, bootstrap_means, num_episodes
from ivideogpt.metrics.judges import HIGHER_IS_BETTER
from ivideogpt.metrics.protocols import differing_fields
from ivideogpt.metrics.results import OVERALL


@dataclass(frozen=True)
class Difference:
    """One metric of two results.

    Attributes:
        metric: its name.
        first: mean of the first result.
        second: mean of the second result.
        change: second - first.
        interval: lower and upper end of the change's interval; None where there are no values of single videos.
        p_value: how often chance alone gives a change as large, two-sided; None as above.
        better: whether the second is better.
        wins: share of videos in which the second is better; None as above.
    """

    metric: str
    first: float
    second: float
    change: float
    interval: tuple[float, float] | None
    p_value: float | None
    better: bool
    wins: float | None

    @property
    def real(self) -> bool | None:
        """Whether the change is larger than chance; None where nobody can tell."""
        return None if self.interval is None else not self.interval[0] <= 0 <= self.interval[1]

    @property
    def verdict(self) -> str:
        """In words."""
        if self.real is None:
            return "too few episodes, or no values of single ones: nobody can tell"
        if not self.real:
            return "no larger than chance"
        return "the second is better" if self.better else "the first is better"


def compare(
    first: Mapping[str, Any], second: Mapping[str, Any], resamples: int = RESAMPLES, seed: int = 0
) -> list[Difference]:
    """The difference of two results (:func:`ivideogpt.metrics.results.read_results`), metric by metric.

    Args:
        first: of one model, say before a change.
        second: of another model by the same protocol on the same videos.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: naming the fields that differ, if they were not measured in the same way on the same videos.
    """
    fields = differing_fields(first["protocol"], second["protocol"])
    if fields:
        raise ValueError(
            f"these were measured by different protocols, so their numbers do not compare: {_join(fields)}"
        )
    _check_videos(first, second)
    networks, others = (result["hashes"]["networks"] for result in (first, second))
    different = [name for name in networks if name in others and networks[name] != others[name]]
    if different:
        raise ValueError(f"these were measured with different networks, so they do not compare: {_join(different)}")
    metrics = [name for name in first[OVERALL]["model"] if name in second[OVERALL]["model"]]
    with_videos = [name for name in metrics if name in first["videos"][0]["best"]]
    values = [
        np.array([[np.mean(video["best"][name]) for name in with_videos] for video in result["videos"]])
        for result in (first, second)
    ]
    changes = values[1] - values[0]  # (N, M)
    episodes = [video["key"] for video in first["videos"]]
    if num_episodes(episodes) < FEWEST:
        with_videos = []
    means = bootstrap_means(changes, resamples, seed, episodes)
    tail = (1 - LEVEL) / 2
    ends = np.quantile(means, [tail, 1 - tail], axis=0)
    found = []
    for metric in metrics:
        one, other = first[OVERALL]["model"][metric], second[OVERALL]["model"][metric]
        up = HIGHER_IS_BETTER.get(metric, False)
        better = (other > one) == up and other != one
        if metric not in with_videos:
            found.append(Difference(metric, one, other, other - one, None, None, better, None))
            continue
        column = with_videos.index(metric)
        spread = means[:, column]
        # how much of the bootstrap lies on the other side of no change; never 0, for it is only so many resamples
        below, above = ((spread <= 0).sum() + 1) / (resamples + 1), ((spread >= 0).sum() + 1) / (resamples + 1)
        of_video = changes[:, column]
        wins = float(((of_video > 0) if up else (of_video < 0)).mean())
        low, high = (float(end) for end in ends[:, column])
        p_value = float(min(1.0, 2 * min(below, above)))
        found.append(Difference(metric, one, other, other - one, (low, high), p_value, better, wins))
    return found


def _check_videos(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Raises ValueError unless both are of the same videos, in the same order."""
    contents = [sorted(h for shards in result["hashes"]["data"].values() for h in shards.values()) for result in
                (first, second)]  # fmt: skip
    if contents[0] != contents[1]:
        names = [", ".join(result["hashes"]["data"]) for result in (first, second)]
        raise ValueError(
            f"these were measured on different recordings ({names[0]} against {names[1]}, by the shards' hashes), so "
            f"their videos cannot be paired"
        )
    places = [[(video["key"], video["start"]) for video in result["videos"]] for result in (first, second)]
    if places[0] != places[1]:
        number = next((i for i, (a, b) in enumerate(zip(*places, strict=False)) if a != b), min(map(len, places)))
        raise ValueError(
            f"these are not about the same videos: {len(places[0])} and {len(places[1])} of them, and number {number} "
            f"is another one"
        )


def _join(lines: list[str]) -> str:
    shown = "; ".join(lines[:6])
    return f"{shown}; and {len(lines) - 6} more" if len(lines) > 6 else shown
