"""The episode schema: one recording, checked when it is made.

Notation: T frames, H x W pixels, C = 3 channels, A action dimensions.

    video         uint8   (T, H, W, C)
    actions       float32 (T, A) or None   actions[t] is taken at frame t; the last row may be zero
    rewards       float32 (T,) or None     rewards[t] is received on arriving at frame t; rewards[0] = 0
    terminations  bool    (T,)             True at the frame that ended the task (False everywhere: cut off by time)
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """One recording.

    Args:
        video: uint8 frames (T, H, W, 3).
        actions: float32 (T, A), or None where the source has none.
        rewards: float32 (T,), or None where the source has none.
        terminations: bool (T,); None means all False.
        fps: Frames a second of the recording (before any stride).
        camera: Name of the camera at the source.
        source: Where the recording comes from, such as `metaworld/plate-slide-v3`.
        licence: Licence of the recording.
        metadata: Anything JSON that belongs to the recording (task, seed, noise, ...).

    Raises:
        ValueError: Wrong rank, dtype, length or value; the message holds the offending value.
    """

    video: np.ndarray
    actions: np.ndarray | None = None
    rewards: np.ndarray | None = None
    terminations: np.ndarray | None = None
    fps: float = 1.0
    camera: str = ""
    source: str = ""
    licence: str = ""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_video(self.video)
        length = self.video.shape[0]
        if self.actions is not None:
            _check_array("actions", self.actions, np.float32, 2, length)
            if self.actions.shape[1] == 0:
                raise ValueError("actions have width 0; use actions=None for a recording without actions")
        if self.rewards is not None:
            _check_array("rewards", self.rewards, np.float32, 1, length)
            if self.rewards[0] != 0:
                raise ValueError(
                    f"rewards[0] is {self.rewards[0]}: rewards[t] is received on arriving at frame t, so the first "
                    "must be 0; shift the rewards by one"
                )
        if self.terminations is None:
            object.__setattr__(self, "terminations", np.zeros(length, dtype=bool))
        else:
            _check_array("terminations", self.terminations, np.bool_, 1, length)
        if not (isinstance(self.fps, (int, float)) and math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be a positive number, got {self.fps!r}")
        for name in ("camera", "source", "licence"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a string, got {getattr(self, name)!r}")
        try:
            json.dumps(self.metadata)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata must be JSON: {error}") from error

    def __len__(self) -> int:
        return self.video.shape[0]

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.video.shape[1], self.video.shape[2]

    @property
    def action_dim(self) -> int | None:
        """Width of an action, or None without actions."""
        return None if self.actions is None else self.actions.shape[1]


def _check_video(video: np.ndarray) -> None:
    """Checks rank, dtype and size of a video (T, H, W, 3)."""
    if not isinstance(video, np.ndarray):
        raise ValueError(f"video must be a numpy array, got {type(video).__name__}")
    if video.ndim != 4:
        raise ValueError(f"video must have 4 dimensions (T, H, W, C), got shape {video.shape}")
    if video.dtype != np.uint8:
        raise ValueError(f"video must be uint8 in 0..255, got {video.dtype}")
    if video.shape[3] != 3:
        raise ValueError(f"video must have 3 channels in its last dimension, got shape {video.shape}")
    if 0 in video.shape:
        raise ValueError(f"video is empty: shape {video.shape}")


def _check_array(name: str, array: np.ndarray, dtype: type, ndim: int, length: int) -> None:
    """Checks one array that runs along the frames."""
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name} must be a numpy array, got {type(array).__name__}")
    if array.dtype != dtype:
        raise ValueError(f"{name} must be {np.dtype(dtype).name}, got {array.dtype}")
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s), got shape {array.shape}")
    if array.shape[0] != length:
        raise ValueError(f"{name} has {array.shape[0]} rows for {length} frames; one row a frame is needed")
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise ValueError(f"{name} holds {array[row]} at frame {row}; every value must be finite")
