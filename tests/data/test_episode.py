"""The episode schema refuses what no episode may hold, and says what it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ivideogpt.data.episode import Episode

VIDEO = np.zeros((5, 8, 8, 3), np.uint8)


def test_fields() -> None:
    episode = Episode(VIDEO, actions=np.zeros((5, 4), np.float32), rewards=np.zeros(5, np.float32))
    assert (len(episode), episode.resolution, episode.action_dim) == (5, (8, 8), 4)
    assert episode.terminations is not None
    assert episode.terminations.dtype == bool
    assert not episode.terminations.any()
    assert Episode(VIDEO).action_dim is None


def with_nan() -> np.ndarray:
    actions = np.zeros((5, 2), np.float32)
    actions[3, 1] = np.nan
    return actions


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"video": VIDEO[0]}, r"4 dimensions .* got shape \(8, 8, 3\)"),
        ({"video": VIDEO.astype(np.float32)}, "must be uint8 .* got float32"),
        ({"video": VIDEO.transpose(0, 3, 1, 2)}, r"3 channels in its last dimension, got shape \(5, 3, 8, 8\)"),
        ({"video": VIDEO[:0]}, "empty"),
        ({"video": VIDEO.tolist()}, "numpy array, got list"),
        ({"actions": np.zeros((4, 2), np.float32)}, "actions has 4 rows for 5 frames"),
        ({"actions": np.zeros((5, 2))}, "actions must be float32, got float64"),
        ({"actions": np.zeros(5, np.float32)}, r"actions must have 2 dimension\(s\), got shape \(5,\)"),
        ({"actions": np.zeros((5, 0), np.float32)}, "width 0"),
        ({"actions": with_nan()}, "nan.* at frame 3"),
        ({"rewards": np.ones(5, np.float32)}, r"rewards\[0\] is 1.0"),
        ({"rewards": np.array([0, 1, 2, np.inf, 0], np.float32)}, "inf at frame 3"),
        ({"rewards": np.zeros((5, 1), np.float32)}, r"rewards must have 1 dimension\(s\)"),
        ({"terminations": np.zeros(5, np.int64)}, "terminations must be bool"),
        ({"fps": 0}, "fps must be a positive number, got 0"),
        ({"fps": float("nan")}, "fps must be a positive number"),
        ({"camera": 3}, "camera must be a string"),
        ({"metadata": {"a": VIDEO}}, "metadata must be JSON"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Episode(**({"video": VIDEO} | fields))
