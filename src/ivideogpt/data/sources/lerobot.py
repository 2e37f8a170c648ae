"""Reads LeRobotDataset v3 folders, as the `lerobot` package writes them: parquet tables, MP4 videos, JSON.

    meta/info.json                               features, frames a second, where data and videos lie
    meta/episodes/chunk-000/file-000.parquet     a row an episode: its length, tasks, tables, and times in the videos
    data/chunk-000/file-000.parquet              a row a frame, many episodes a file; images too where there is no video
    videos/CAMERA/chunk-000/file-000.mp4         many episodes a file

`action` is (T, A), taken at frame t. `next.reward` and `next.done` follow the action: they are of the frame behind it.
Tasks and all other features of one dimension (`observation.state`, ...) go to the metadata. A video is decoded from
the key frame in front of its episode on. Needs pyarrow and, for videos, PyAV (extra `lerobot`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.episode import Episode
from ivideogpt.data.sources.frames import Job, decode_image, failing, pyav, stack_frames
from ivideogpt.data.sources.npz import NpzOptions, episode_from_arrays

EPISODES = "meta/episodes"
CAMERAS = ("video", "image")
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")


@dataclasses.dataclass(frozen=True)
class LerobotOptions:
    """How to read the recordings.

    Args:
        camera: Key of the camera, such as observation.images.top; None: the only one.
        actions_key: Feature with the actions.
        rewards_key: Feature with the rewards, which follow the actions; none where there is no such feature.
        fps: Frames a second; None: what the data set says.
        source: Where the recordings come from; None: `lerobot`.
        licence: Their licence.
    """

    camera: str | None = None
    actions_key: str = "action"
    rewards_key: str = "next.reward"
    fps: float | None = None
    source: str | None = None
    licence: str = "unknown"


@dataclasses.dataclass(frozen=True)
class Info:
    """What `meta/info.json` says, checked."""

    root: Path
    features: dict[str, dict[str, Any]]
    fps: float
    data_path: str
    video_path: str | None
    robot: str

    @property
    def cameras(self) -> list[str]:
        """Keys of the cameras."""
        return [key for key, feature in self.features.items() if feature.get("dtype") in CAMERAS]

    def file(self, template: str, chunk: int, number: int, camera: str = "") -> Path:
        """The file that a template of `info.json` names.

        Raises:
            ValueError: It lies outside of the data set.
        """
        values = {"chunk_index": f"{chunk:03d}", "file_index": f"{number:03d}", "video_key": camera}
        name = re.sub(r"\{(\w+)(?::0?3d)?\}", lambda found: values.get(found[1], found[0]), template)
        path = self.root / name
        if not path.resolve().is_relative_to(self.root.resolve()):
            raise ValueError(f"{self.root / 'meta/info.json'} names {name!r}, which lies outside of the data set")
        return path


def read_info(source: str | Path) -> Info:
    """Reads `meta/info.json`.

    Raises:
        ValueError: It is not there, of another version, or says nothing that can be used.
    """
    root = Path(source)
    path = root / "meta/info.json"
    if not path.is_file():
        raise ValueError(f"{root} is no LeRobotDataset: it has no meta/info.json")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = str(found["codebase_version"])
        if not version.startswith("v3."):
            raise ValueError(
                f"it is of version {version}, v3 can be read: convert it with lerobot's convert_dataset_v21_to_v30"
            )
        features = {str(key): dict(feature) for key, feature in found["features"].items()}
        video_path = found.get("video_path")
        return Info(
            root, features, float(found["fps"]), str(found["data_path"]),
            None if video_path is None else str(video_path), str(found.get("robot_type") or ""),
        )  # fmt: skip
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: {what}") from error


def lerobot_cameras(source: str | Path, options: LerobotOptions | None = None) -> list[str]:
    """Keys of the cameras that a data set has."""
    return read_info(source).cameras


def lerobot_jobs(source: str | Path, options: LerobotOptions | None = None) -> list[Job]:
    """The episodes of a data set in order, and how to read each.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: It is no data set of version 3, has no such camera or feature, or lists no episode.
    """
    options, info = options or LerobotOptions(), read_info(source)
    there = ", ".join(info.cameras) or "none"
    if options.camera is None and len(info.cameras) != 1:
        raise ValueError(f"{info.root} has the cameras {there}: name one with --camera, or all")
    camera = options.camera or info.cameras[0]
    if camera not in info.cameras:
        raise ValueError(f"{info.root} has no camera {camera!r}; there are {there}")
    if options.actions_key != LerobotOptions.actions_key and options.actions_key not in info.features:
        raise ValueError(f"{info.root} has no feature {options.actions_key!r}; there are {', '.join(info.features)}")
    is_video = info.features[camera]["dtype"] == "video"
    jobs: list[Job] = []
    for row in _episode_rows(info, camera if is_video else None):
        name = f"episode_{row.get('episode_index', len(jobs))}"
        try:
            number = int(row["episode_index"])
            name = f"episode_{number:06d}"
            table = info.file(info.data_path, int(row["data/chunk_index"]), int(row["data/file_index"]))
            video, start = None, 0.0
            if is_video:
                if info.video_path is None:
                    raise ValueError("meta/info.json has no video_path")
                place = f"videos/{camera}/"
                chunk, file = int(row[f"{place}chunk_index"]), int(row[f"{place}file_index"])
                video, start = info.file(info.video_path, chunk, file, camera), float(row[f"{place}from_timestamp"])
            tasks = [str(task) for task in row.get("tasks") or []]
            jobs.append(
                (
                    name,
                    partial(
                        read_episode, table, video, info, options, camera, number, int(row["length"]), start, tasks
                    ),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else error
            jobs.append((name, partial(failing, f"{info.root / EPISODES}, {name}: {what}")))
    if not jobs:
        raise ValueError(f"{info.root / EPISODES} lists no episode")
    return jobs


def _episode_rows(info: Info, camera: str | None) -> Iterator[dict[str, Any]]:
    """A row of the tables of episodes at a time, without their statistics."""
    parquet = parquet_module()
    wanted = ["episode_index", "tasks", "length", "data/chunk_index", "data/file_index"]
    if camera is not None:
        wanted += [f"videos/{camera}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    files = sorted((info.root / EPISODES).rglob("*.parquet"))
    if not files:
        raise ValueError(f"{info.root / EPISODES} holds no table of episodes")
    for file in files:
        try:
            with parquet.ParquetFile(file) as opened:
                names = set(opened.schema_arrow.names)
                for batch in opened.iter_batches(columns=[name for name in wanted if name in names]):
                    yield from batch.to_pylist()
        except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
            raise ValueError(f"{file} is no whole parquet file: {error}") from error


def read_episode(
    table: Path, video: Path | None, info: Info, options: LerobotOptions, camera: str, number: int, length: int,
    start: float, tasks: list[str],
) -> Episode:  # fmt: skip
    """Reads one episode.

    Args:
        table: Parquet file with its frames.
        video: MP4 file with its pictures; None: they are in the table.
        info: Of the data set.
        options: How to read it.
        camera: Key of the camera.
        number: Of the episode.
        length: Frames that it has.
        start: Its first frame's time in the video, in seconds.
        tasks: Its tasks.

    Raises:
        ImportError: pyarrow or PyAV is not installed.
        ValueError: A file is missing or damaged, or has not what the data set says; the message names the file.
    """
    plain = [
        key for key, feature in info.features.items()
        if feature.get("dtype") not in (*CAMERAS, "audio") and key not in BOOKKEEPING
    ]  # fmt: skip
    columns = plain if video is not None else [*plain, camera]
    try:
        found = (
            parquet_module()
            .read_table(table, columns=[*columns, "frame_index"], filters=[("episode_index", "=", number)])
            .sort_by("frame_index")
        )
        if found.num_rows != length:
            raise ValueError(f"it has {found.num_rows} frames of episode {number}, {length} are wanted")
        values = {key: found[key].to_pylist() for key in plain}
        pictures = [] if video is not None else found[camera].to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{table}: {error}") from error
    arrays: dict[str, Any] = {}
    if video is not None:
        arrays["video"] = decode_part(video, start, length, info.fps)
    else:
        names = (f"{table}, episode {number}, frame {index}" for index in range(length))
        images = ((one or {}).get("bytes") or b"" for one in pictures)
        arrays["video"] = stack_frames(map(decode_image, images, names), f"{table}, episode {number}")
    if options.actions_key in values:
        actions = np.asarray(values.pop(options.actions_key), np.float32)
        arrays["actions"] = actions.reshape(length, -1)
    if options.rewards_key in values:
        arrays["rewards"] = np.asarray(values.pop(options.rewards_key), np.float32).reshape(length)
    if "next.done" in values:
        done = np.asarray(values.pop("next.done"), bool).reshape(length)
        arrays["terminations"] = np.append(False, done[:-1])
        arrays["terminations"][-1] |= done[-1]  # no frame is behind the last
    reading = NpzOptions(
        video_key="video", reward_follows_action=True, fps=options.fps or info.fps, camera=camera,
        source=options.source or "lerobot", licence=options.licence,
    )  # fmt: skip
    metadata = {"episode": number, "tasks": tasks, "robot": info.robot} | values
    try:
        return dataclasses.replace(episode_from_arrays(arrays, reading), metadata=metadata)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{table}, episode {number}: {error}") from error


def decode_part(path: Path, start: float, length: int, fps: float) -> np.ndarray:
    """`length` frames of a video from the time `start` on, uint8 (T, H, W, 3).

    Raises:
        ImportError: PyAV is not installed.
        ValueError: They are not there, or do not decode; the message names the file.
    """
    av = pyav("reading", "lerobot")

    def decoded(container: Any) -> Iterator[np.ndarray]:
        stream, left = container.streams.video[0], length
        container.seek(max(int((start - 1 / fps) / stream.time_base), 0), stream=stream)  # to a key frame before it
        for frame in container.decode(stream):
            if frame.time is not None and frame.time < start - 0.5 / fps:
                continue
            yield frame.to_ndarray(format="rgb24")
            left -= 1
            if left == 0:
                return

    name = f"{path} from {start:g} s on"
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            frames = stack_frames(decoded(container), name)
    except (av.FFmpegError, OSError, EOFError, UnicodeError) as error:
        raise ValueError(f"{name} does not decode: {error}") from error
    if len(frames) != length:
        raise ValueError(f"{name} has {len(frames)} frames, {length} are wanted")
    return frames


def parquet_module() -> Any:
    """The module pyarrow.parquet.

    Raises:
        ImportError: It is not installed; the message names the extra.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(
            f"LeRobotDatasets need pyarrow ({error}); install it with: pip install 'ivideogpt[lerobot]'"
        ) from error
    return parquet
