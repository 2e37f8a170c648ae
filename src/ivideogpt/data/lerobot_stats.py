"""The statistics of a LeRobotDataset, `meta/stats.json`: policies normalise by them.

Of each feature smallest, largest, mean and standard deviation, and the number of rows; of pictures by channel, in
[0, 1], as (3, 1, 1).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ivideogpt.data.statistics import RunningStats


class FeatureStats:
    """Adds up the rows of every feature."""

    def __init__(self) -> None:
        self._numbers: dict[str, RunningStats] = {}
        self._pictures: dict[str, RunningStats] = {}

    def add_columns(self, columns: dict[str, Any], features: dict[str, Any]) -> None:
        """Adds an episode's columns of numbers."""
        for name, values in columns.items():
            if features[name]["dtype"] not in ("image", "video"):
                rows = np.asarray(values, np.float64).reshape(len(values), -1)
                self._numbers.setdefault(name, RunningStats()).add(rows)

    def add_pictures(self, camera: str, video: np.ndarray) -> None:
        """Adds an episode's frames (T, H, W, 3) of a camera, one after another."""
        stats = self._pictures.setdefault(camera, RunningStats())
        for frame in video:
            stats.add(frame.reshape(-1, 3) / 255)

    def result(self, frames: int) -> dict[str, Any]:
        """What `meta/stats.json` holds of so many frames."""
        found: dict[str, Any] = {}
        for stats, shape in ((self._numbers, (-1,)), (self._pictures, (3, 1, 1))):
            for name, of_feature in stats.items():
                row = of_feature.result()
                if row is not None:
                    count = frames if name in self._pictures else row["count"]
                    values = {key: np.reshape(row[key], shape).tolist() for key in ("min", "max", "mean", "std")}
                    found[name] = values | {"count": [count]}
        return found
