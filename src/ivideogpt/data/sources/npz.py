"""Reads episodes from .npz files: what BAIR, RT-1 and Meta-World recordings look like there, and plain ones.

What is read from which array:

    video         `--video-key`, or the first of: observation (T, 3k, H, W), k stacked frames of which the newest, last
                  three channels are taken; aux1_image (BAIR's camera); video, image, videos, images.
                  (T, H, W, 3) or (T, 3, H, W); whole numbers 0..255 of any integer type, or floats in [0, 1]
    actions       action or actions, (T, A) or (T-1, A), taken at frame t. With `observation`: the action that led to
                  row t, so it moves up by one row
    rewards       reward or rewards, (T,), (T, 1) or (T-1,), received on arriving at frame t (T-1 rows: from frame 1
                  on); with `reward_follows_action` the reward for the action taken at frame t, so it moves down by one
    terminations  termination(s) or done(s) as booleans, or discount = 0
    fps           one number
"""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.episode import Episode
from ivideogpt.data.sources.frames import Job

STACKED = "observation"
VIDEO_KEYS = (STACKED, "aux1_image", "video", "image", "videos", "images")


@dataclasses.dataclass(frozen=True)
class NpzOptions:
    """How to read the files where they do not say it themselves.

    Args:
        video_key: Array that holds the frames; None: the first known one.
        reward_follows_action: rewards[t] belongs to the action taken at frame t, not to the arrival at frame t.
        fps: Frames a second, unless the file has `fps`.
        camera: Camera name; None: the key.
        source: Where the recordings come from; None: `npz`.
        licence: Their licence.
    """

    video_key: str | None = None
    reward_follows_action: bool = False
    fps: float = 1.0
    camera: str | None = None
    source: str | None = None
    licence: str = "unknown"


def read_npz(path: str | Path, options: NpzOptions | None = None) -> Episode:
    """Reads one episode.

    Raises:
        ValueError: Not a whole .npz file, pickled objects inside, no frames, or arrays that make no episode; the
            message names the file.
    """
    path, options = Path(path), options or NpzOptions()
    try:
        # np.load leaves a file that it opened itself open when it is not a whole archive
        with open(path, "rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array, not an .npz archive of named ones")
            with archive:
                return episode_from_arrays(archive, options)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path}: not a whole .npz file: {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def npz_jobs(source: str | Path, options: NpzOptions | None = None) -> list[Job]:
    """The .npz files of a folder and its subfolders in order of their paths, and how to read each; or one file.

    Raises:
        ValueError: There is none.
    """
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.rglob("*.npz"))
    if not files:
        raise ValueError(f"{source} {'holds no .npz file' if path.is_dir() else 'does not exist'}")
    names = [file.relative_to(path).as_posix() if path.is_dir() else file.name for file in files]
    return [(name, partial(read_npz, file, options)) for name, file in zip(names, files, strict=True)]


def episode_from_arrays(arrays: Mapping[str, Any], options: NpzOptions) -> Episode:
    """Makes an episode of named arrays.

    Raises:
        ValueError: As for `read_npz`.
    """
    key = options.video_key or next((name for name in VIDEO_KEYS if name in arrays), None)
    if key is None or key not in arrays:
        wanted = f"no array {options.video_key!r}" if options.video_key else f"none of {', '.join(VIDEO_KEYS)}"
        raise ValueError(f"{wanted} among its arrays {sorted(arrays)}; name the frames with --video-key")
    frames = np.asarray(arrays[key])
    stacked = key == STACKED and frames.ndim == 4 and frames.shape[1] % 3 == 0 and frames.shape[1] > 3
    video = video_from_array(frames[:, -3:] if stacked else frames, key)
    length = len(video)

    actions = _first(arrays, "action", "actions")
    if actions is not None:
        actions = _floats("action", actions)
        actions = actions[:, None] if actions.ndim == 1 else actions
        if stacked:  # row t holds the action that led there
            actions = actions[1:]
        if len(actions) == length - 1:
            actions = np.concatenate([actions, np.zeros_like(actions[:1])])
    rewards = _first(arrays, "reward", "rewards")
    if rewards is not None:
        rewards = _rewards(_floats("reward", rewards), length, options.reward_follows_action)
    fps = float(np.asarray(arrays["fps"])) if "fps" in arrays else options.fps
    return Episode(
        video=video,
        actions=actions,
        rewards=rewards,
        terminations=_terminations(arrays),
        fps=fps,
        camera=options.camera or key,
        source=options.source or "npz",
        licence=options.licence,
    )


def video_from_array(frames: np.ndarray, name: str) -> np.ndarray:
    """Frames in either order of dimensions and any unambiguous number type -> uint8 (T, H, W, 3).

    Raises:
        ValueError: The rank, the order of dimensions or the range cannot be told or is wrong.
    """
    if frames.ndim != 4:
        raise ValueError(f"{name} must have 4 dimensions, got shape {frames.shape}")
    last, first = frames.shape[3] == 3, frames.shape[1] == 3
    if last == first:
        problem = "could be (T, 3, H, W) as well as (T, H, W, 3)" if last else "has no dimension of 3 colours"
        raise ValueError(f"{name} of shape {frames.shape} {problem}")
    if first:
        frames = frames.transpose(0, 2, 3, 1)
    if frames.size == 0:
        raise ValueError(f"{name} is empty: shape {frames.shape}")
    if frames.dtype != np.uint8:
        if frames.dtype.kind not in "iuf":
            raise ValueError(f"{name} has the type {frames.dtype}; numbers are needed")
        low, high = frames.min(), frames.max()
        limit = 1 if frames.dtype.kind == "f" else 255
        if not (low >= 0 and high <= limit):  # NaN fails here too
            raise ValueError(f"{name} of {frames.dtype} must lie in 0..{limit}, got {low}..{high}")
        frames = np.rint(frames * 255.0) if limit == 1 else frames
    return np.ascontiguousarray(frames.astype(np.uint8))


def _first(arrays: Mapping[str, Any], *names: str) -> np.ndarray | None:
    return next((np.asarray(arrays[name]) for name in names if name in arrays), None)


def _floats(name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "iufb":
        raise ValueError(f"{name} has the type {values.dtype}; numbers are needed")
    return values.astype(np.float32)


def _rewards(rewards: np.ndarray, length: int, follows_action: bool) -> np.ndarray:
    """Rewards in the schema's convention (T,): received on arriving at frame t, 0 at frame 0."""
    if rewards.ndim == 2 and rewards.shape[1] == 1:
        rewards = rewards[:, 0]
    if rewards.ndim != 1 or len(rewards) not in (length, length - 1):
        raise ValueError(f"reward of shape {rewards.shape} does not fit {length} frames")
    if len(rewards) == length - 1 or follows_action:
        return np.concatenate([np.zeros(1, np.float32), rewards[: length - 1]])
    if rewards[0] != 0:
        raise ValueError(
            f"reward starts with {rewards[0]}, but nothing can be received on arriving at the first frame; if "
            "reward[t] belongs to the action taken at frame t, say --reward-follows-action"
        )
    return rewards


def _terminations(arrays: Mapping[str, Any]) -> np.ndarray | None:
    found = _first(arrays, "termination", "terminations", "done", "dones")
    if found is None and "discount" in arrays:
        found = np.asarray(arrays["discount"]) == 0
    if found is None:
        return None
    return found.reshape(len(found), -1)[:, 0].astype(bool)
