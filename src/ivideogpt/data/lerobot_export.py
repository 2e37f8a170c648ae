"""Writes shard sets as LeRobotDataset v3 folders, which the `lerobot` package opens.

Pictures go into the parquet tables as PNG, which loses nothing, or into MP4 files as H.264, which does. Cameras of one
recording become several cameras of one episode. The data set is written aside and renamed when it is whole.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.blocks import psnr
from ivideogpt.data.episode import Episode
from ivideogpt.data.lerobot_stats import FeatureStats
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.sources.frames import pyav
from ivideogpt.data.sources.lerobot import parquet_module
from ivideogpt.drawing import png_bytes

VERSION = "v3.0"
FRAMES_A_FILE = 5_000
CHUNK = 1000
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEOS = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
CRF = "18"


def recordings(shards: ShardSet) -> Iterator[list[Episode]]:
    """The episodes of each recording: one, or as many as it has cameras; they follow one another in a set."""
    group: list[Episode] = []
    name: str | None = None
    for number in range(len(shards)):
        episode = shards.episode(number)
        if episode is None:
            continue
        own = episode.metadata.get("recording")
        if group and (own is None or own != name):
            yield group
            group = []
        group.append(episode)
        name = None if own is None else str(own)
    if group:
        yield group


def export_lerobot(
    shards: ShardSet,
    out: Path,
    video: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Writes a data set.

    Args:
        shards: What is written; all with one frame rate, picture size, action width, and the same cameras.
        out: Folder, which must not be there.
        video: Pictures as H.264 in MP4 files (smaller, and they lose something) in place of PNG in the tables.
        progress: Called with (episodes of the set done, all of them).

    Returns:
        `episodes`, `frames`, `cameras`, and with `video` the `psnr` of all frames in dB (None where nothing is lost).

    Raises:
        ImportError: pyarrow, or PyAV with `video`, is not installed.
        ValueError: The folder is there, or the episodes do not agree.
        OSError: It cannot be written; nothing is left then.
    """
    parquet_module()
    if out.exists():
        raise ValueError(f"{out} is there already; give another folder")
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        writer = _Writer(aside, video)
        done = 0
        for group in recordings(shards):
            writer.add(group)
            done += len(group)
            if progress is not None:
                progress(done, len(shards))
        found = writer.finish()
        os.replace(aside, out)
        return found
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


class _Writer:
    """Adds episodes one after another."""

    def __init__(self, root: Path, video: bool) -> None:
        self.root, self.video = root, video
        self.info: dict[str, Any] | None = None
        self.cameras: list[str] = []
        self.tasks: dict[str, int] = {}
        self.rows: list[dict[str, Any]] = []
        self.frames, self.in_file, self.file = 0, 0, 0
        self.error, self.values = 0.0, 0
        self.stats = FeatureStats()
        self._table: Any = None
        self._videos: dict[str, _VideoFile] = {}

    def add(self, group: list[Episode]) -> None:
        first = group[0]
        length = len(first)
        cameras = [camera_key(episode.camera, number) for number, episode in enumerate(group)]
        features = self._features(group, cameras)
        if self.info is None:
            self.info = {"fps": first.fps, "features": features, "robot_type": first.source or "unknown"}
            self.cameras = cameras
        if self.info["features"] != features or self.info["fps"] != first.fps or {*map(len, group)} != {length}:
            raise ValueError(
                f"episode {len(self.rows)} ({first.source}, {cameras}, {first.fps:g} frames a second, "
                f"{first.resolution} pixels, actions {first.action_dim}) differs from the first; a LeRobotDataset has "
                f"one kind of episodes: export the sources one by one"
            )
        if self.in_file and self.in_file + length > FRAMES_A_FILE:
            self._close_files()
        named = task_of(first)
        task = self.tasks.setdefault(named, len(self.tasks))
        chunk, file = divmod(self.file, CHUNK)
        row: dict[str, Any] = {
            "episode_index": len(self.rows), "tasks": [named], "length": length,
            "data/chunk_index": chunk, "data/file_index": file,
            "dataset_from_index": self.frames, "dataset_to_index": self.frames + length,
            "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0,
        }  # fmt: skip
        columns = self._columns(first, task)
        self.stats.add_columns(columns, features)
        for camera, episode in zip(cameras, group, strict=True):
            self.stats.add_pictures(camera, episode.video)
            if self.video:
                start = self._video(camera, chunk, file).add(episode.video) / first.fps
                place = f"videos/{camera}/"
                row |= {f"{place}chunk_index": chunk, f"{place}file_index": file, f"{place}from_timestamp": start,
                        f"{place}to_timestamp": start + length / first.fps}  # fmt: skip
            else:
                columns[camera] = [{"bytes": png_bytes(frame), "path": None} for frame in episode.video]
        self._write(columns, chunk, file)
        self.rows.append(row)
        self.frames, self.in_file = self.frames + length, self.in_file + length

    def _features(self, group: list[Episode], cameras: list[str]) -> dict[str, Any]:
        first = group[0]
        kind = "video" if self.video else "image"
        found: dict[str, Any] = {
            camera: {"dtype": kind, "shape": [*episode.resolution, 3], "names": ["height", "width", "channels"]}
            for camera, episode in zip(cameras, group, strict=True)
        }
        if first.action_dim is not None:
            found["action"] = {"dtype": "float32", "shape": [first.action_dim], "names": None}
        for name, values in _rows_of_metadata(first).items():
            found[name] = {"dtype": "float32", "shape": [values.shape[1]], "names": None}
        if first.rewards is not None:
            found["next.reward"] = {"dtype": "float32", "shape": [1], "names": None}
        found["next.done"] = {"dtype": "bool", "shape": [1], "names": None}
        own = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
        return found | {
            n: {"dtype": d, "shape": [1], "names": None} for n, d in (own | {"task_index": "int64"}).items()
        }

    def _columns(self, episode: Episode, task: int) -> dict[str, Any]:
        length = len(episode)
        columns: dict[str, Any] = {}
        if episode.actions is not None:
            columns["action"] = [row.tolist() for row in episode.actions]
        columns |= {name: [row.tolist() for row in values] for name, values in _rows_of_metadata(episode).items()}
        if episode.rewards is not None:  # ours are received on arriving, theirs follow the action
            columns["next.reward"] = np.append(episode.rewards[1:], np.float32(0))
        assert episode.terminations is not None
        columns["next.done"] = np.append(episode.terminations[1:], episode.terminations[-1:])
        columns["timestamp"] = (np.arange(length) / episode.fps).astype(np.float32)
        columns["frame_index"] = np.arange(length, dtype=np.int64)
        columns["episode_index"] = np.full(length, len(self.rows), np.int64)
        columns["index"] = np.arange(self.frames, self.frames + length, dtype=np.int64)
        columns["task_index"] = np.full(length, task, np.int64)
        return columns

    def _write(self, columns: dict[str, Any], chunk: int, file: int) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        types = {"action": pa.list_(pa.float32()), "next.done": pa.bool_()}
        types |= {name: pa.list_(pa.float32()) for name in columns if name.startswith("observation.")}
        types |= {camera: pa.struct([("bytes", pa.binary()), ("path", pa.string())]) for camera in self.cameras}
        table = pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()})
        if self._table is None:
            path = self.root / DATA.format(chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._table = parquet.ParquetWriter(path, table.schema)
        self._table.write_table(table)

    def _video(self, camera: str, chunk: int, file: int) -> _VideoFile:
        if camera not in self._videos:
            assert self.info is not None
            path = self.root / VIDEOS.format(video_key=camera, chunk_index=chunk, file_index=file)
            self._videos[camera] = _VideoFile(path, self.info["fps"])
        return self._videos[camera]

    def _close_files(self) -> None:
        if self._table is not None:
            self._table.close()
        for video in self._videos.values():
            error, values = video.close()
            self.error, self.values = self.error + error, self.values + values
        self._table, self._videos = None, {}
        self.file, self.in_file = self.file + 1, 0

    def finish(self) -> dict[str, Any]:
        import pyarrow as pa
        from pyarrow import parquet

        if self.info is None:
            raise ValueError("there is no episode to export")
        self._close_files()
        meta = self.root / "meta"
        (meta / "episodes/chunk-000").mkdir(parents=True)
        parquet.write_table(pa.Table.from_pylist(self.rows), meta / "episodes/chunk-000/file-000.parquet")
        tasks = pa.table({"task_index": list(self.tasks.values()), "__index_level_0__": list(self.tasks)})
        pandas = {"index_columns": ["__index_level_0__"], "column_indexes": [], "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64",
             "metadata": None},
            {"name": None, "field_name": "__index_level_0__", "pandas_type": "unicode", "numpy_type": "object",
             "metadata": None},
        ]}  # fmt: skip
        tasks = tasks.replace_schema_metadata(
            {"pandas": json.dumps(pandas)}
        )  # lerobot reads the tasks as pandas' index
        parquet.write_table(tasks, meta / "tasks.parquet")
        fps = self.info["fps"]
        info = {
            "codebase_version": VERSION, "robot_type": self.info["robot_type"], "total_episodes": len(self.rows),
            "total_frames": self.frames, "total_tasks": len(self.tasks), "chunks_size": CHUNK,
            "data_files_size_in_mb": 100, "video_files_size_in_mb": 200, "fps": int(fps) if fps == int(fps) else fps,
            "splits": {"train": f"0:{len(self.rows)}"}, "data_path": DATA, "video_path": VIDEOS if self.video else None,
            "features": self.info["features"],
        }  # fmt: skip
        (meta / "stats.json").write_text(json.dumps(self.stats.result(self.frames), indent=4), encoding="utf-8")
        (meta / "info.json").write_text(json.dumps(info, indent=4), encoding="utf-8")
        found = {"episodes": len(self.rows), "frames": self.frames, "cameras": self.cameras}
        return found | ({"psnr": psnr(self.error, self.values)} if self.video else {})


def task_of(episode: Episode) -> str:
    """What the robot was told: the task or instruction that the recording names, else its label or source."""
    for name, value in episode.metadata.items():
        if name == "tasks" or name.rpartition("/")[2] in ("task", "label") or "instruction" in name:
            first = value[0] if isinstance(value, list) and value else value
            if isinstance(first, str) and first:
                return first
    return episode.source or "unknown"


def _rows_of_metadata(episode: Episode) -> dict[str, np.ndarray]:
    """Features (T, N) beside pictures and actions that a recording of LeRobot's brought along, such as its state."""
    found = {}
    for name, value in episode.metadata.items():
        if name.startswith("observation.") and isinstance(value, list) and len(value) == len(episode):
            try:
                rows = np.asarray(value, np.float32)
            except (TypeError, ValueError):  # text, or rows of different lengths
                continue
            if rows.ndim <= 2 and np.isfinite(rows).all():
                found[name] = rows.reshape(len(episode), -1)
    return found


class _VideoFile:
    """An H.264 file that episodes are appended to; it is decoded again at the end to see what was lost."""

    def __init__(self, path: Path, fps: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.count = path, 0
        self._av, self._kept = pyav("writing", "lerobot"), list[np.ndarray]()
        self._container = self._av.open(str(path), "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps).limit_denominator(100_000))
        self._stream.pix_fmt = "yuv444p"  # colours at full resolution
        # key frames close together, as lerobot does: clips are cut anywhere
        self._stream.options = {"crf": CRF, "g": "2"}

    def add(self, video: np.ndarray) -> int:
        """Appends frames (T, H, W, 3); the number of the first."""
        if not self.count:
            self._stream.height, self._stream.width = video.shape[1:3]
        for frame in video:
            self._container.mux(self._stream.encode(self._av.VideoFrame.from_ndarray(frame, format="rgb24")))
        self._kept.append(video)
        self.count += len(video)
        return self.count - len(video)

    def close(self) -> tuple[float, int]:
        """Ends the file; the sum of squared errors of its frames, and how many values they have."""
        self._container.mux(self._stream.encode())
        self._container.close()
        error, frames = 0.0, iter(frame for video in self._kept for frame in video)
        with self._av.open(str(self.path)) as container:
            for found, frame in zip(container.decode(video=0), frames, strict=True):
                error += float(np.square(found.to_ndarray(format="rgb24").astype(np.float64) - frame).sum())
        return error, sum(math.prod(video.shape) for video in self._kept)


def camera_key(camera: str, number: int) -> str:
    """The key that lerobot has for a camera, which is the camera's own where it came from there."""
    return camera if camera.startswith("observation.") else f"observation.images.{camera or f'camera{number}'}"
