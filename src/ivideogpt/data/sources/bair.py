"""Reads BAIR's robot pushing set: the TFRecords of softmotion30_44k, one trajectory a record.

For the frames i = 0, 1, ... a record holds `i/image_aux1/encoded` and `i/image_main/encoded` (the raw bytes of a square
RGB frame, 64 x 64 x 3, whatever the name says), `i/action` (4 floats, taken at frame i) and `i/endeffector_pos`
(3 floats, which go into the episode's metadata). There are no rewards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.episode import Episode
from ivideogpt.data.sources.npz import NpzOptions
from ivideogpt.data.sources.tfrecord import Feature, RecordJobs, parse_example, read_records

CAMERA = "image_aux1"  # the camera that every publication on this set predicts


def read_bair(path: str | Path, options: NpzOptions | None = None) -> Iterator[Episode]:
    """Reads the episodes of one `.tfrecords` file in turn.

    Args:
        path: The file.
        options: `video_key` is `image_aux1` (if None) or `image_main`; frames a second, camera, source and licence
            as for .npz files.

    Raises:
        ValueError: A damaged file or a record that is no BAIR trajectory; the message names the file.
    """
    for number, data in enumerate(read_records(path)):
        try:
            yield episode_from_record(data, f"record {number}", options or NpzOptions())
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def bair_jobs(path: str | Path, options: NpzOptions | None = None) -> tuple[RecordJobs, None]:
    """The episodes of a file, or of all `.tfrecords` files below a folder, as (key, how to read it).

    Their number is in no file, so it is not known beforehand.

    Raises:
        ValueError: There is no such file.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.rglob("*.tfrecords"), key=_natural)
    if not files:
        raise ValueError(f"{path} {'holds no .tfrecords file' if path.is_dir() else 'does not exist'}")
    names = [file.relative_to(path).as_posix() if path.is_dir() else file.name for file in files]
    prefixes = [re.sub(r"[^A-Za-z0-9_-]+", "_", name.removesuffix(".tfrecords")).lstrip("-")[-60:] for name in names]
    if len(set(prefixes)) < len(prefixes):
        raise ValueError(f"{path} holds files whose names do not tell them apart: {names}")
    decode = partial(episode_from_record, options=options or NpzOptions())
    return RecordJobs(tuple((file, prefix, None) for file, prefix in zip(files, prefixes, strict=True)), decode), None


def bair_cameras(path: str | Path, options: NpzOptions | None = None) -> list[str]:
    """Names of the cameras in the first record that can be read."""
    for file, _, _ in bair_jobs(path, options)[0].files:
        try:
            names = parse_example(next(iter(read_records(file))))
        except (ValueError, StopIteration):
            continue
        return sorted({name.split("/")[1] for name in names if name.endswith("/encoded") and name.count("/") == 2})
    return []


def episode_from_record(data: bytes, key: str, options: NpzOptions) -> Episode:
    """Makes an episode of a serialised tf.train.Example; `key` names the record in messages.

    Raises:
        ValueError: Not a BAIR trajectory.
    """
    features = parse_example(data)
    camera = options.video_key or CAMERA
    length = 0
    while f"{length}/{camera}/encoded" in features:
        length += 1
    if not length:
        there = sorted({name.split("/")[1] for name in features if name.endswith("/encoded") and name.count("/") == 2})
        raise ValueError(f"{key} has no frame 0/{camera}/encoded; the cameras there are {there}")
    known = [int(name.split("/")[0]) for name in features if re.match(r"\d+/", name)]
    if max(known) >= length:
        raise ValueError(f"{key} has a frame {max(known)}, but {length}/{camera}/encoded is missing")
    frames = [_frame(features[f"{i}/{camera}/encoded"], f"{key}: {i}/{camera}/encoded") for i in range(length)]
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"{key} mixes frames of {sorted({frame.shape for frame in frames})}")
    metadata: dict[str, Any] = {"record": key}
    positions = _rows(features, "endeffector_pos", length, key)
    if positions is not None:
        metadata["endeffector_pos"] = positions.tolist()
    return Episode(
        video=np.stack(frames),
        actions=_rows(features, "action", length, key),
        fps=options.fps,
        camera=options.camera or camera,
        source=options.source or "bair",
        licence=options.licence,
        metadata=metadata,
    )


def _frame(feature: Feature, name: str) -> np.ndarray:
    """One raw square frame (H, W, 3)."""
    if isinstance(feature, np.ndarray) or len(feature) != 1:
        raise ValueError(f"{name} is not one byte string")
    raw = np.frombuffer(feature[0], np.uint8)
    side = math.isqrt(len(raw) // 3)
    if side == 0 or side * side * 3 != len(raw):
        raise ValueError(f"{name} has {len(raw)} bytes, which are no square RGB frame (64 x 64 x 3 are 12288)")
    return raw.reshape(side, side, 3)


def _rows(features: dict[str, Feature], what: str, length: int, key: str) -> np.ndarray | None:
    """Numbers of every frame (T, N), or None where no frame has them."""
    found = [features.get(f"{i}/{what}") for i in range(length)]
    if all(row is None for row in found):
        return None
    rows = [row for row in found if isinstance(row, np.ndarray) and row.dtype == np.float32]
    if len(rows) < length or len({len(row) for row in rows}) != 1:
        raise ValueError(f"{key}: {what} must be as many floats in each of the {length} frames")
    return np.stack(rows)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts traj_256_to_511 before traj_1024_to_1279."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.as_posix())]
