"""Which frames make a clip."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ivideogpt.data.segments import clip_indices, even_starts, frame_stride, gather_rows, last_start, shrink_stride


@pytest.mark.parametrize(
    ("rate", "stride"), [(3, 1), (10, 3), (5, 2), (15, 5), (20, 7), (30, 10), (2, 1), (1, 1), (12.5, 4), (0.5, 1)]
)
def test_frame_stride(rate: float, stride: int) -> None:
    """The rates of the OXE data sets, brought to 3 Hz."""
    assert frame_stride(rate) == stride


def test_stride_shrinks_until_the_window_fits() -> None:
    assert shrink_stride(10, 151, 16) == 10
    assert shrink_stride(10, 150, 16) == 9
    assert shrink_stride(3, 16, 16) == 1
    assert shrink_stride(3, 5, 16) == 1
    assert shrink_stride(3, 5, 1) == 3


def test_consecutive_clip() -> None:
    np.testing.assert_array_equal(clip_indices(30, 4, stride=3, start=5), [5, 8, 11, 14])


def test_start_beyond_the_last_possible_one_moves_back() -> None:
    np.testing.assert_array_equal(clip_indices(10, 4, start=9), [6, 7, 8, 9])


def test_random_starts_reach_both_ends() -> None:
    rng = np.random.default_rng(0)
    clips = np.stack([clip_indices(12, 4, stride=2, rng=rng) for _ in range(200)])
    assert set(clips[:, 0]) == set(range(last_start(12, 4, 2) + 1)) == set(range(6))
    assert (np.diff(clips) == 2).all()
    assert clips.max() == 11


def test_short_episode_repeats_its_last_frame() -> None:
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(clip_indices(3, 6, stride=5, rng=rng), [0, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(clip_indices(1, 3, rng=rng), [0, 0, 0])


def test_random_selection_keeps_the_order_of_time() -> None:
    rng = np.random.default_rng(0)
    clips = np.stack([clip_indices(40, 8, horizon=16, rng=rng) for _ in range(300)])
    assert (np.diff(clips) > 0).all()
    assert np.ptp(clips, axis=1).max() == 15
    offsets = clips - clips[:, :1]
    assert len({tuple(row) for row in offsets}) > 200


def test_shuffle_is_a_permutation() -> None:
    rng = np.random.default_rng(0)
    clips = [clip_indices(8, 8, shuffle=True, rng=rng) for _ in range(20)]
    assert all(sorted(clip) == list(range(8)) for clip in clips)
    assert len({tuple(clip) for clip in clips}) == 20


def test_goal_is_the_last_frame_in_front() -> None:
    np.testing.assert_array_equal(clip_indices(30, 5, start=3, goal=True), [6, 3, 4, 5, 6])
    assert len(clip_indices(30, 17, start=0, goal=True)) == 17


def test_same_generator_same_clip() -> None:
    one, two = (
        clip_indices(90, 6, horizon=12, shuffle=True, goal=True, rng=np.random.default_rng([7, 8])) for _ in range(2)
    )
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segment_length": 0}, "segment_length 0 leaves no frame"),
        ({"segment_length": 1, "goal": True}, "segment_length 1 leaves no frame"),
        ({"segment_length": 8, "horizon": 7}, "horizon 7 is shorter than the 8"),
        ({"segment_length": 8, "start": -1}, "start -1 is negative"),
        ({"segment_length": 8, "stride": 0, "start": 0}, "at least 1, got 0"),
        ({"segment_length": 8}, "needs rng"),
        ({"segment_length": 8, "start": 0, "shuffle": True}, "needs rng"),
    ],
)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip_indices(20, **arguments)


def test_even_starts() -> None:
    assert even_starts(20, 5, 1, 1) == [0]
    assert even_starts(20, 5, 1, 4) == [0, 5, 10, 15]
    assert even_starts(6, 5, 1, 4) == [0, 1]  # only two places: no clip twice
    assert even_starts(3, 5, 1, 4) == [0]


def test_rows_follow_the_frames() -> None:
    actions = np.arange(10, dtype=np.float32)[:, None] + 1
    np.testing.assert_array_equal(gather_rows(actions, np.array([8, 9, 9]))[:, 0], [9, 10, 10])
    np.testing.assert_array_equal(gather_rows(actions, np.array([9, 8, 9]), goal=True)[:, 0], [0, 9, 10])
    assert actions[9, 0] == 10  # the recording itself stays
