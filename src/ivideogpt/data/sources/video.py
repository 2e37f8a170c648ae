"""Reads episodes from a folder of videos, or of folders of images, with actions beside them where there are some.

    clips/push_1.mp4      one episode: .mp4, .avi, .webm or .gif, decoded with PyAV (extra `video`)
    clips/push_1.csv      its actions: push_1.npy, push_1.csv or push_1.json
    clips/push_2/9.png    one episode: a folder of .png or .jpg files in natural order (9.png before 10.png)
    UCF/Archery/v_*.avi   the folder that a recording lies in is kept as `label` in its metadata

Actions are (T, A) or (T-1, A), taken at frame t. A .csv has one row a frame; with a header, columns named as below are
taken out of the actions. A .json holds a list of rows, or an object with `actions`, `rewards`, `terminations` (or
`dones`), `fps`; whatever else is in it goes to the metadata.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.episode import Episode
from ivideogpt.data.sources.frames import SIDE_SUFFIXES, Job, decode_image, decode_video, natural, stack_frames
from ivideogpt.data.sources.npz import NpzOptions, episode_from_arrays

VIDEO_SUFFIXES = (
    ".mp4",
    ".avi",
    ".webm",
    ".gif",
    ".mkv",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".wmv",
    ".flv",
    ".ogv",
    ".ts",
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
COLUMNS = ("reward", "rewards", "termination", "terminations", "done", "dones")
UCF_NAME = re.compile(r"v_\w+_g(\d+)_c(\d+)$")  # v_<class>_g<group>_c<clip>: clips of a group share a scene


@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """How to read the recordings where they do not say it themselves.

    Args:
        labels: Keep the name of the folder that a recording lies in as its label.
        reward_follows_action: rewards[t] belongs to the action taken at frame t, not to the arrival at frame t.
        fps: Frames a second; None: what the file beside it or the video says, else 1.
        camera: Camera name.
        source: Where the recordings come from; None: `video`.
        licence: Their licence.
    """

    labels: bool = True
    reward_follows_action: bool = False
    fps: float | None = None
    camera: str = "video"
    source: str | None = None
    licence: str = "unknown"


def video_jobs(source: str | Path, options: VideoOptions | None = None) -> list[Job]:
    """The recordings of a folder and its subfolders in natural order, and how to read each.

    Raises:
        ValueError: There is no video and no folder of images.
    """
    source, options = Path(source), options or VideoOptions()
    if not source.exists():
        raise ValueError(f"{source} does not exist")
    found = find_videos(source)
    if not found:
        raise ValueError(f"{source} holds no video ({', '.join(VIDEO_SUFFIXES)}) and no folder of .png or .jpg files")
    jobs: list[Job] = []
    for path in found:
        inside = path.relative_to(source if source.is_dir() else source.parent)
        name = inside.with_suffix("") if path.is_file() else inside
        name_text = name.as_posix() if name.name else path.stem
        label = inside.parent.name if options.labels else ""
        jobs.append((name_text, partial(read_video, path, options, {"label": label} if label else None)))
    return jobs


def find_videos(source: Path) -> list[Path]:
    """Videos and folders of images in natural order; names that start with a dot are left out."""
    if source.is_file():
        return [source] if source.suffix.lower() in VIDEO_SUFFIXES else []
    found: set[Path] = set()
    for path in source.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(source).parts) or not path.is_file():
            continue
        if path.suffix.lower() in VIDEO_SUFFIXES:
            found.add(path)
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            found.add(path.parent)
    return sorted(found, key=natural)


def read_video(
    path: str | Path, options: VideoOptions | None = None, metadata: dict[str, Any] | None = None
) -> Episode:
    """Reads one episode: a video file or a folder of images, with the actions beside it.

    Args:
        path: The file or folder.
        options: How to read it.
        metadata: What is known of it already.

    Raises:
        ImportError: PyAV is not installed and the recording is a video.
        ValueError: It does not decode, has frames of different sizes, or the file beside it does not fit; the message
            names the file.
    """
    path, options = Path(path), options or VideoOptions()
    rate: float | None = None
    try:
        if path.is_dir():
            video = _images(path)
        elif path.is_file():
            video, rate = decode_video(path, "the video")
            if path.suffix.lower() == ".gif" and path.read_bytes().rstrip(b"\0")[-1:] != b";":  # decodes up to the cut
                raise ValueError("the video is cut off: its end mark is missing")
        else:
            raise ValueError("there is no such file or folder")
        metadata = {"file": path.name, **(metadata or {})}
        if match := UCF_NAME.match(path.stem):
            metadata |= {"group": int(match[1]), "clip": int(match[2])}
        arrays, more = _beside(path)
        metadata = more | metadata
        if options.fps is not None:  # what the user says comes first
            arrays.pop("fps", None)
        plain = NpzOptions(
            video_key="video",
            reward_follows_action=options.reward_follows_action,
            fps=options.fps if options.fps is not None else (rate or 1.0),
            camera=options.camera,
            source=options.source or "video",
            licence=options.licence,
        )
        return dataclasses.replace(episode_from_arrays(arrays | {"video": video}, plain), metadata=metadata)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _images(folder: Path) -> np.ndarray:
    files = sorted((file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES), key=natural)
    files = [file for file in files if not file.name.startswith(".")]
    return stack_frames((decode_image(file.read_bytes(), file.name) for file in files), "the folder")


def _beside(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays (actions, rewards, ...) of the file beside a recording, and what else it says."""
    stem = path.name if path.is_dir() else path.stem
    files = [file for suffix in SIDE_SUFFIXES if (file := path.with_name(stem + suffix)).is_file()]
    if not files:
        return {}, {}
    if len(files) > 1:
        raise ValueError(f"several files beside it: {', '.join(file.name for file in files)}; one is needed")
    reader = {".npy": _npy, ".csv": _csv, ".json": _json}[files[0].suffix]
    try:
        return reader(files[0])
    except (OSError, EOFError, ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{files[0].name} beside it: {error}") from error


def _npy(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with open(file, "rb") as stream:
        actions = np.load(stream, allow_pickle=False)
    if not isinstance(actions, np.ndarray):
        raise ValueError("it is an .npz archive; one array is needed")
    return {"actions": actions}, {}


def _csv(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with open(file, newline="", encoding="utf-8-sig") as stream:
        rows = [row for row in csv.reader(stream) if any(value.strip() for value in row)]
    if not rows:
        raise ValueError("it has no rows")
    header = [f"column {i}" for i in range(len(rows[0]))]
    if not all(_is_number(value) for value in rows[0]):
        header = [value.strip() for value in rows.pop(0)]
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} values for {len(header)} columns")
        if bad := next((value for value in row if not _is_number(value)), None):
            raise ValueError(f"row {number} holds {bad!r}; numbers are needed")
    values = np.array(rows, dtype=np.float64).reshape(len(rows), len(header))
    arrays: dict[str, Any] = {name: values[:, i] for i, name in enumerate(header) if name in COLUMNS}
    actions = [i for i, name in enumerate(header) if name not in COLUMNS]
    if actions:
        arrays["actions"] = values[:, actions]
    names = [header[i] for i in actions]
    return arrays, {"action_names": names} if names and not names[0].startswith("column ") else {}


def _json(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(found, list):
        found = {"actions": found}
    if not isinstance(found, dict):
        raise ValueError("it must hold a list of actions or an object with `actions`")
    known = ("action", "actions", "fps", *COLUMNS)
    arrays = {name: np.asarray(value) for name, value in found.items() if name in known and value is not None}
    return arrays, {name: value for name, value in found.items() if name not in known}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
