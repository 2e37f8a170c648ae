"""Reads RoboNet's HDF5 files, one episode each.

What is read from where:

    video     env/cam<N>_video/frames: the bytes of an MP4 file, or frame0, frame1, ...: the bytes of one JPEG each.
              Cropped to the centred square
    actions   policy/actions (T-1, A), taken at frame t, as 5 dimensions: displacement in x, y, z, wrist angle, gripper

Actions of another width follow RoboNet's rules: recordings whose gripper closed by itself (`primitives` is
`autograsp`, 4 dimensions) get the gripper's upper bound where the state that follows lies above the middle of its
bounds, else the lower bound; any other are filled with zeros or cut. One row fewer than frames gets a zero row.

Files say in `image_format` how their encoder was given the colours. RoboNet's JPEGs were written by OpenCV, which
takes BGR: frames marked RGB went into it as they were, and so lie in the file with red and blue exchanged.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.episode import Episode
from ivideogpt.data.sources.frames import Job, decode_image, decode_video, natural, stack_frames
from ivideogpt.data.sources.hdf5 import dataset, hdf5_files, open_hdf5
from ivideogpt.data.sources.npz import NpzOptions, episode_from_arrays

ACTION_DIM = 5
SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class RobonetOptions:
    """How to read RoboNet.

    Args:
        camera: Number of the camera.
        test_list: File with the names of the test files: a JSON list, or one name a line.
        split: `train` leaves the files of `test_list` out, `test` takes them alone; None: every file.
        crop: Cut the frames to the centred square.
        fps: Frames a second.
        source: Where the recordings come from; None: `robonet/<robot>`.
        licence: Their licence.
    """

    camera: int = 0
    test_list: str | Path | None = None
    split: str | None = None
    crop: bool = True
    fps: float = 1.0
    source: str | None = None
    licence: str = "unknown"


def robonet_jobs(source: str | Path, options: RobonetOptions | None = None) -> list[Job]:
    """The episodes of a folder of RoboNet files in natural order, and how to read each.

    Raises:
        ValueError: No HDF5 file, a split without a list, or a list that names files that are not there.
    """
    options = options or RobonetOptions()
    if options.split is not None and options.split not in SPLITS:
        raise ValueError(f"split {options.split!r} is not one of {SPLITS}")
    if options.split is not None and options.test_list is None:
        raise ValueError(f"split {options.split!r} needs the list of test files")
    files = hdf5_files(source)
    if options.split is not None and options.test_list is not None:
        test = read_test_list(options.test_list)
        if options.split == "test" and (missing := sorted(test - {path.name for path, _ in files}, key=natural)):
            raise ValueError(f"{source}: {len(missing)} of {len(test)} test files are not there, such as {missing[0]}")
        files = [(path, name) for path, name in files if (path.name in test) == (options.split == "test")]
        if not files:
            raise ValueError(f"{source} holds no file of the split {options.split!r}")
    return [(name, partial(read_robonet, path, options)) for path, name in files]


def robonet_cameras(source: str | Path, options: RobonetOptions | None = None) -> list[int]:
    """Numbers of the cameras of the first file that can be read."""
    for path, _ in hdf5_files(source):
        try:
            with open_hdf5(path) as file:
                names = [re.fullmatch(r"cam(\d+)_video", name) for name in file["env"]]
        except ValueError:
            continue
        return sorted(int(match[1]) for match in names if match)
    return []


def read_test_list(path: str | Path) -> set[str]:
    """Names of the test files, without folders.

    Raises:
        ValueError: No such file, no list of names, or an empty one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        names = json.loads(text) if Path(path).suffix.lower() == ".json" else text.split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} must hold a list of file names")
    found = {Path(name.strip()).name for name in names if name.strip()}
    if not found:
        raise ValueError(f"{path} names no file")
    return found


def read_robonet(path: str | Path, options: RobonetOptions | None = None) -> Episode:
    """Reads one episode.

    Raises:
        ImportError: h5py, or PyAV for MP4 frames, is not installed.
        ValueError: No whole file, no such camera, frames that do not decode, or arrays that make no episode; the
            message names the file.
    """
    options = options or RobonetOptions()
    with open_hdf5(path) as file:
        video = _video(file, options)
        metadata = _metadata(file)
        actions = _actions(file, metadata)
        if options.crop:
            size = min(video.shape[1:3])
            top, left = ((side - size) // 2 for side in video.shape[1:3])
            video = np.ascontiguousarray(video[:, top : top + size, left : left + size])
        robot = metadata.get("robot")
        plain = NpzOptions(
            video_key="video",
            fps=options.fps,
            camera=f"cam{options.camera}",
            source=options.source or (f"robonet/{robot}" if isinstance(robot, str) else "robonet"),
            licence=options.licence,
        )
        episode = episode_from_arrays({"video": video, "actions": actions}, plain)
        return dataclasses.replace(episode, metadata=metadata | {"file": Path(path).name})


def _video(file: Any, options: RobonetOptions) -> np.ndarray:
    """Frames of the camera, RGB, uncropped: uint8 (T, H, W, 3)."""
    key = f"env/cam{options.camera}_video"
    if key not in file:
        there = sorted((name for name in file.get("env", ()) if name.endswith("_video")), key=natural)
        raise ValueError(f"there is no {key}; cameras there: {', '.join(there) or 'none'}")
    group = file[key]
    if "frames" in group:
        item = dataset(group, "frames")
        video, _ = decode_video(io.BytesIO(np.asarray(item[()]).tobytes()), f"{key}/frames")
        stated = item.attrs.get("T")
        if stated is not None and int(stated) != len(video):
            raise ValueError(f"{key}/frames decodes to {len(video)} frames, but says that it has {int(stated)}")
        return video[..., ::-1] if _colours(item) == "BGR" else video
    names = [f"frame{t}" for t in range(len(group))]
    if not names or any(name not in group for name in names):
        raise ValueError(f"{key} holds neither `frames` nor frame0..frame{max(len(names) - 1, 0)}")
    items = [dataset(group, name) for name in names]
    video = stack_frames(
        (
            decode_image(np.asarray(item[()]).tobytes(), f"{key}/{name}")
            for item, name in zip(items, names, strict=True)
        ),
        key,
    )
    return video if _colours(items[0]) == "BGR" else video[..., ::-1]


def _colours(item: Any) -> str:
    """Order of the colours that the encoder was given."""
    value = _plain(item.attrs.get("image_format", "RGB"))
    if value not in ("RGB", "BGR"):
        raise ValueError(f"{item.name} has the image format {value!r}; RGB or BGR is needed")
    return value


def _actions(file: Any, metadata: dict[str, Any]) -> np.ndarray:
    """Actions (T-1, 5) by RoboNet's rules."""
    item = dataset(file, "policy/actions")
    actions = np.asarray(item[()])
    if actions.ndim != 2 or actions.dtype.kind not in "iuf" or 0 in actions.shape:
        raise ValueError(f"policy/actions must be numbers (T, A), got {actions.dtype} of shape {actions.shape}")
    actions = actions.astype(np.float32)
    width = actions.shape[1]
    if width == ACTION_DIM - 1 and metadata.get("primitives") == "autograsp":
        return np.concatenate([actions, _gripper(file, len(actions))[:, None]], axis=1)
    if width < ACTION_DIM:
        return np.pad(actions, ((0, 0), (0, ACTION_DIM - width)))
    return actions[:, :ACTION_DIM]


def _gripper(file: Any, steps: int) -> np.ndarray:
    """Gripper action (steps,) of an autograsp recording: the bound that the following state is nearer to."""
    low, high = (_bound(file, name) for name in ("low_bound", "high_bound"))
    state = np.asarray(dataset(file, "env/state")[()])
    if state.ndim != 2 or len(state) < steps + 1:
        raise ValueError(f"env/state of shape {state.shape} must have a row after each of the {steps} actions")
    if not np.isfinite(state[1 : steps + 1, -1]).all():
        raise ValueError("env/state holds a gripper position that is not finite")
    return np.where(state[1 : steps + 1, -1] > (low + high) / 2, high, low).astype(np.float32)


def _bound(file: Any, name: str) -> float:
    """Last value of a bound of the state, which is the gripper's; it lies in one of three places."""
    if name in file.get("misc", ()):
        value = np.asarray(dataset(file, f"misc/{name}")[()])
    elif "metadata" in file and name in file["metadata"].attrs:
        value = np.asarray(file["metadata"].attrs[name])
    elif name in file.get("env", ()):
        value = np.asarray(dataset(file, f"env/{name}")[()])
    else:
        raise ValueError(f"an autograsp recording needs {name} in misc, the attributes of metadata, or env")
    if value.dtype.kind not in "iuf" or value.size == 0 or not np.isfinite(value.flat[-1]):
        raise ValueError(f"{name} must be finite numbers, got {value}")
    return float(value.flat[-1])


def _metadata(file: Any) -> dict[str, Any]:
    """What the file says about itself, as JSON."""
    found: dict[str, Any] = {}
    if "metadata" in file:
        found = {name: _plain(value) for name, value in file["metadata"].attrs.items()}
    for name in file.get("misc", ()):
        found.setdefault(name, _plain(dataset(file, f"misc/{name}")[()]))
    return found


def _plain(value: Any) -> Any:
    """A value of HDF5 as JSON; what has no JSON becomes its text."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
