"""Decodes images and videos into uint8 frames (T, H, W, 3), and sorts names the way people count.

PyAV (extra `video`) is imported where a video is decoded; images need Pillow alone.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from ivideogpt.data.episode import Episode

Job = tuple[str, Callable[[], Episode]]
"""Name of an episode, which is no legal shard key yet, and how to get it: a `partial` whose `Path` arguments are the
files that it reads, so that a conversion can tell when they change."""
Name = TypeVar("Name", str, Path)

MAX_BYTES = 8 << 30  # decoded frames of one episode: beyond it a conversion would end in the kernel's hands
IMAGE_FORMATS = ("JPEG", "PNG")
SIDE_SUFFIXES = (".npy", ".csv", ".json")  # of the file beside a video that holds its actions


def natural(name: str | Path) -> list[tuple[int, int | str]]:
    """Sort key under which `frame10` comes after `frame9`.

    >>> sorted(["demo_10", "demo_9"], key=natural)
    ['demo_9', 'demo_10']
    """
    parts = re.split(r"([0-9]+)", str(name))
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


class MissingEpisodesError(ValueError):
    """Episodes that are not where they should be; `episodes` is their number, as far as it is known."""

    def __init__(self, message: str, episodes: int) -> None:
        super().__init__(message)
        self.episodes = episodes


def failing(message: str, episodes: int = 1) -> Episode:
    """Raises the message: the job of an episode, or of several, known to be bad before it is read."""
    raise MissingEpisodesError(message, episodes) if episodes > 1 else ValueError(message)


def files_of(read: Callable[..., Any]) -> Iterator[Path]:
    """The files and folders that a job reads."""
    if isinstance(read, partial):
        yield from files_of(read.func)
        for value in (*read.args, *read.keywords.values()):
            if isinstance(value, Path):
                yield value
            elif isinstance(value, partial):
                yield from files_of(value)


def stamp(path: Path) -> tuple[int, int]:
    """(bytes, nanoseconds of the last change) of a file, or of a folder's files; -1 where there is none.

    The file of actions beside a video belongs to it.
    """
    try:
        found = path.stat()
        if path.suffix.lower() in (".npz", ".tfrecord", ".tfrecords", ".hdf5", ".h5"):  # nothing is beside those
            return found.st_size, found.st_mtime_ns
        stem = path.stem
        inside = []
        if path.is_dir():
            stem, inside = path.name, [file.stat() for file in path.iterdir()]
        beside = [file.stat() for suffix in SIDE_SUFFIXES if (file := path.with_name(stem + suffix)).is_file()]
    except OSError:
        return -1, -1
    everything = [found, *inside, *beside]
    return sum(file.st_size for file in everything), max(file.st_mtime_ns for file in everything)


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Bytes of a JPEG or PNG -> uint8 (H, W, 3), RGB; transparency is dropped.

    Raises:
        ValueError: Neither of the two formats, damaged or far too large; the message holds the name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                return np.array(image.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(f"{name} is no JPEG or PNG image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name} does not decode: {error}") from error


def stack_frames(frames: Iterable[np.ndarray], name: str) -> np.ndarray:
    """Frames (H, W, 3) one after another -> uint8 (T, H, W, 3).

    Raises:
        ValueError: No frame, frames of different sizes, or more than fits into memory.
    """
    taken: list[np.ndarray] = []
    size = 0
    for frame in frames:
        if taken and frame.shape != taken[0].shape:
            first, other = taken[0].shape, frame.shape
            raise ValueError(
                f"{name} mixes resolutions: frame 0 is {first[0]} x {first[1]} (height x width), "
                f"frame {len(taken)} is {other[0]} x {other[1]}"
            )
        size += frame.nbytes
        if size > MAX_BYTES:
            raise ValueError(f"{name} decodes to more than {MAX_BYTES >> 20} MiB; cut it into shorter episodes")
        taken.append(frame)
    if not taken:
        raise ValueError(f"{name} holds no frame")
    return np.stack(taken)


def pyav(doing: str, extra: str = "video") -> Any:
    """The module PyAV.

    Raises:
        ImportError: It is not installed; the message says what for and names the extra.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f"{doing} videos needs PyAV ({error}); install it with: pip install 'ivideogpt[{extra}]'"
        ) from error
    return av


def decode_video(file: str | Path | io.BytesIO, name: str) -> tuple[np.ndarray, float | None]:
    """A video file -> uint8 frames (T, H, W, 3), RGB, and its frames a second where it says so.

    A file that was cut off often decodes without an error up to the cut, so what came out is compared with what the
    container promised. Up to 5 % or two frames may be missing: AVI counts frames that hold nothing.

    Raises:
        ImportError: PyAV is not installed.
        ValueError: It does not decode, or not as far as it says; the message holds the name.
    """
    av = pyav("reading")
    end: list[float] = [0.0]

    def decoded(container: Any) -> Iterable[np.ndarray]:
        for frame in container.decode(video=0):
            if frame.time is not None:
                end[0] = max(end[0], frame.time)
            yield frame.to_ndarray(format="rgb24")

    try:
        with av.open(str(file) if isinstance(file, Path) else file) as container:
            if not container.streams.video:
                raise ValueError(f"{name} has no video stream")
            stream = container.streams.video[0]
            rate = float(stream.average_rate) if stream.average_rate else None
            seconds = float(stream.duration * stream.time_base) if stream.duration else None
            if seconds is None and container.duration and not container.streams.audio:
                seconds = container.duration / av.time_base
            promised = stream.frames or (round(seconds * rate) if seconds and rate else 0)
            frames = stack_frames(decoded(container), name)
    except (av.FFmpegError, EOFError, UnicodeError) as error:
        raise ValueError(f"{name} does not decode: {error}") from error
    # With a changing frame rate fewer frames fill the same time, so the last frame's time counts as well.
    reached = max(len(frames), round(end[0] * rate) + 1 if rate and not stream.frames else 0)
    if promised - reached > max(2, 0.05 * promised):
        raise ValueError(f"{name} is cut off: it decodes to {reached} of {promised} frames")
    return frames, rate
