"""Which frames of an episode make a clip: pure functions of lengths, rates and a random generator.

An episode of `length` frames is thinned by a stride; a window of `horizon` strided frames is placed at a start frame;
of the window all frames, or a random selection in order of time, are the clip. A goal-conditioned clip has its own last
frame in front. Where the episode is too short the stride shrinks first, then the last frame is repeated.
"""

from __future__ import annotations

import numpy as np

TARGET_RATE = 3.0  # Hz; the rate of fractal20220817_data, to which every OXE data set is resampled


def frame_stride(fps: float, target_rate: float = TARGET_RATE) -> int:
    """Stride that brings a recording of `fps` frames a second near the target rate: max(round(fps / rate), 1)."""
    if not fps > 0 or not target_rate > 0:
        raise ValueError(f"rates must be positive, got {fps} and {target_rate} Hz")
    return max(round(fps / target_rate), 1)


def shrink_stride(stride: int, length: int, window: int) -> int:
    """The largest stride not above `stride` with which `window` frames fit into `length`; 1 if none does."""
    if stride < 1 or length < 1 or window < 1:
        raise ValueError(f"stride, length and window must be at least 1, got {stride}, {length}, {window}")
    if window == 1:
        return stride
    return max(min(stride, (length - 1) // (window - 1)), 1)


def last_start(length: int, window: int, stride: int) -> int:
    """The last frame at which a window can start without running past the end; 0 if none can."""
    return max(length - 1 - (window - 1) * stride, 0)


def clip_indices(
    length: int,
    segment_length: int,
    stride: int = 1,
    start: int | None = None,
    horizon: int | None = None,
    shuffle: bool = False,
    goal: bool = False,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Numbers of the frames of one clip, in the clip's order.

    Args:
        length: Frames of the episode.
        segment_length: Frames of the clip, the goal counted.
        stride: Wanted stride; shrunk when the episode is too short for it.
        start: First frame of the window; None draws it uniformly. Beyond the last possible start it is moved back.
        horizon: Length of the window out of which the clip's frames are selected at random; None takes them all.
        shuffle: Put the frames into random order (tokenizer training for goal conditioning).
        goal: Put the clip's last frame in front.
        rng: Needed where anything is drawn.

    Returns:
        int64 (segment_length,), values in 0..length-1.

    Raises:
        ValueError: A length, stride or horizon out of range.
    """
    body = segment_length - goal
    window = body if horizon is None else horizon
    if body < 1:
        raise ValueError(f"segment_length {segment_length} leaves no frame beside the goal")
    if window < body:
        raise ValueError(f"horizon {window} is shorter than the {body} frames to select from it")
    stride = shrink_stride(stride, length, window)
    latest = last_start(length, window, stride)
    if (start is None or window > body or shuffle) and rng is None:
        raise ValueError("a random start, selection or order needs rng")
    if start is None:
        assert rng is not None
        start = int(rng.integers(latest + 1))
    elif start < 0:
        raise ValueError(f"start {start} is negative")
    offsets = np.arange(body)
    if window > body:
        assert rng is not None
        offsets = np.sort(rng.choice(window, body, replace=False))
    indices = np.minimum(min(start, latest) + offsets * stride, length - 1)
    if goal:
        indices = np.concatenate([indices[-1:], indices])
    if shuffle:
        assert rng is not None
        indices = rng.permutation(indices)
    return indices.astype(np.int64)


def even_starts(length: int, window: int, stride: int, count: int) -> list[int]:
    """At most `count` different start frames, evenly spaced from the first to the last possible one; one: frame 0."""
    if count < 1:
        raise ValueError(f"at least 1 clip an episode is needed, got {count}")
    latest = last_start(length, window, shrink_stride(stride, length, window))
    return sorted({round(value) for value in np.linspace(0, latest, count)}) if count > 1 else [0]


def gather_rows(values: np.ndarray, indices: np.ndarray, goal: bool = False) -> np.ndarray:
    """Rows of actions or rewards for a clip; a goal frame in front gets zeros, as nothing was done there."""
    rows = values[indices]  # a repeated last frame repeats its action
    if goal:
        rows[0] = 0
    return rows
