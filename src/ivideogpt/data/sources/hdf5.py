"""Reads episodes from HDF5 files: robomimic's and robosuite's convention, VP2's, and any other by key paths.

Two layouts:

    many episodes a file   `data/demo_N/...`, or the members of the group `episodes`; the groups of `mask` (filter keys)
                           list names of episodes and serve as splits
    one episode a file     everything else; the paths start at the root of the file

What is read from which path of an episode's group:

    video         `video_key`, or `obs/<camera>_image` or `obs/<camera>`, or the only images that are there;
                  (T, H, W, 3) or (T, 3, H, W), whole numbers 0..255 or floats in [0, 1], or one JPEG or PNG a frame
    actions       `actions_key`, else `actions` or `action` where it is there: (T, A) or (T-1, A), taken at frame t
    rewards       `rewards_key`, else `rewards` or `reward` where it is there
    terminations  `terminations_key`, else `dones` or `done` where it is there

In robomimic's layout (an episode with a group `obs`) rewards[t] and dones[t] follow the action taken at frame t, and so
belong to the arrival at frame t+1. The arrival after the last action is the last row of `next_obs`: where that is
recorded it becomes one more frame, so that the reward of the last action (often the only one) is not lost. Where it is
not, that reward is kept in the metadata as `reward_after_last_frame`.
robosuite's own recordings (`states` and `actions`, no images) are refused with the command that renders them.
h5py is imported where a file is opened.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.episode import Episode
from ivideogpt.data.sources.frames import MAX_BYTES, Job, decode_image, failing, natural, stack_frames
from ivideogpt.data.sources.npz import NpzOptions, episode_from_arrays

SUFFIXES = (".hdf5", ".h5")
VP2_VIDEO_KEYS = ("obs/camera_image", "obs/agentview_shift_2_image")  # RoboDesk, robosuite


@dataclasses.dataclass(frozen=True)
class Hdf5Options:
    """How to read the files where they do not say it themselves.

    Args:
        video_key: Path of the frames inside an episode's group.
        actions_key: Path of the actions; None: `actions` or `action` if there.
        rewards_key: Path of the rewards; None: `rewards` or `reward` if there.
        terminations_key: Path of the ends; None: `dones` or `done` if there.
        episodes: Group whose members are the episodes (`/` for the root); None: `data` where it is there, else the
            file is one episode.
        split: Only the episodes that the filter key `mask/<split>` lists; None: all.
        camera: Name of a camera under `obs`, with or without `_image`.
        next_frame: Whether the last row of `next_obs` becomes one more frame.
        flip: Turn the frames upside down, as robosuite's own renderer leaves them (robomimic's are upright).
        reward_follows_action: rewards[t] and dones[t] belong to the action taken at frame t; None: in robomimic's
            layout.
        fps: Frames a second; None: `control_freq` of robosuite's `env_args`, else 1.
        source: Where the recordings come from; None: `hdf5`.
        licence: Their licence.
        preferred: Paths of frames of which the one that is there is taken before any other.
    """

    video_key: str | None = None
    actions_key: str | None = None
    rewards_key: str | None = None
    terminations_key: str | None = None
    episodes: str | None = None
    split: str | None = None
    camera: str | None = None
    next_frame: bool = True
    flip: bool = False
    reward_follows_action: bool | None = None
    fps: float | None = None
    source: str | None = None
    licence: str = "unknown"
    preferred: tuple[str, ...] = ()


def hdf5_jobs(source: str | Path, options: Hdf5Options | None = None) -> list[Job]:
    """Every episode of a file, or of the HDF5 files in a folder, in natural order, and how to read it.

    A file that cannot be listed is one job that raises the reason, so that a conversion can leave it out.

    Raises:
        ImportError: h5py is not installed.
        ValueError: There is no HDF5 file.
    """
    options = options or Hdf5Options()
    jobs: list[Job] = []
    for path, name in hdf5_files(source):
        try:
            listed = list_episodes(path, options)
        except ValueError as error:
            jobs.append((name, partial(failing, str(error))))
            continue
        for episode, splits in listed:
            full = f"{name}/{episode}" if episode else name
            jobs.append((full, partial(read_hdf5, path, options, episode, splits)))
    return jobs


def vp2_jobs(source: str | Path, options: Hdf5Options | None = None) -> list[Job]:
    """The same for VP2's files: its two cameras are known, and every frame is a row of `obs`, as VP2 counts them."""
    options = options or Hdf5Options()
    options = dataclasses.replace(
        options, next_frame=False, source=options.source or "vp2", preferred=options.preferred or VP2_VIDEO_KEYS
    )
    return hdf5_jobs(source, options)


def hdf5_files(source: str | Path) -> list[tuple[Path, str]]:
    """The HDF5 files of a folder and its subfolders, or the one file, each with a name without its suffix.

    Raises:
        ValueError: There is none.
    """
    source = Path(source)
    if source.is_file():
        return [(source, source.stem)]
    if not source.is_dir():
        raise ValueError(f"{source} does not exist")
    paths = sorted((path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES), key=natural)
    if not paths:
        raise ValueError(f"{source} holds no {' or '.join(SUFFIXES)} file")
    return [(path, path.relative_to(source).with_suffix("").as_posix()) for path in paths]


def hdf5_cameras(source: str | Path, options: Hdf5Options | None = None) -> list[str]:
    """Names of the cameras of the first episode that can be read."""
    options = options or Hdf5Options()
    for path, _ in hdf5_files(source):
        try:
            episode, _ = list_episodes(path, options)[0]
            with open_hdf5(path) as file:
                keys = _image_keys(file[episode or "/"])
        except ValueError:
            continue
        return [key.removeprefix("obs/").removesuffix("_image") if key.startswith("obs/") else key for key in keys]
    return []


@contextmanager
def open_hdf5(path: str | Path) -> Iterator[Any]:
    """Opens a file for reading; whatever goes wrong inside becomes a ValueError that names it.

    Raises:
        ImportError: h5py is not installed.
        ValueError: No whole HDF5 file, or what the caller finds wrong.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(
            f"reading HDF5 needs h5py ({error}); install it with: pip install 'ivideogpt[hdf5]'"
        ) from error
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise ValueError(f"{path}: {reason}") from error


def list_episodes(path: str | Path, options: Hdf5Options) -> list[tuple[str, tuple[str, ...]]]:
    """Paths of the episodes of a file ("" for the root) and the splits that hold each.

    Raises:
        ValueError: No whole file, no such group or split, or a split that names episodes that are not there.
    """
    with open_hdf5(path) as file:
        parent = options.episodes
        if parent is None:
            parent = "data" if _is_group(file, "data") and _groups(file["data"]) else ""
            if not parent:
                if options.split:
                    raise ValueError(f"it holds one episode, so there is no split {options.split!r}")
                return [("", ())]
        if parent.strip("/") and not _is_group(file, parent):
            raise ValueError(f"there is no group {parent!r}; it holds {sorted(file)}")
        names = sorted((name for name in _groups(file[parent or "/"]) if name != "mask"), key=natural)
        if not names:
            raise ValueError(f"the group {parent!r} holds no episode")
        masks = (
            {name: _names(dataset(file, f"mask/{name}")) for name in file["mask"]} if _is_group(file, "mask") else {}
        )
        if options.split is not None:
            if options.split not in masks:
                raise ValueError(f"there is no split {options.split!r}; mask holds {sorted(masks)}")
            missing = sorted(masks[options.split] - set(names), key=natural)
            if missing:
                raise ValueError(f"mask/{options.split} names {missing[0]!r}, which is not there ({len(missing)} such)")
            names = [name for name in names if name in masks[options.split]]
        prefix = f"{parent.strip('/')}/" if parent.strip("/") else ""
        return [(f"{prefix}{name}", tuple(sorted(m for m in masks if name in masks[m]))) for name in names]


def read_hdf5(
    path: str | Path, options: Hdf5Options | None = None, episode: str = "", splits: tuple[str, ...] = ()
) -> Episode:
    """Reads one episode.

    Args:
        path: HDF5 file.
        options: How to read it.
        episode: Path of the episode's group, such as `data/demo_0`; "" for the root of the file.
        splits: Names of the splits that hold it, for the metadata.

    Raises:
        ImportError: h5py is not installed.
        ValueError: No whole file, keys that are not there, or arrays that make no episode; the message names the file
            and the episode.
    """
    options = options or Hdf5Options()
    with open_hdf5(path) as file:
        if episode and not _is_group(file, episode):
            raise ValueError(f"there is no episode {episode!r}")
        try:
            return _read(file, file[episode or "/"], options, episode, splits)
        except ValueError as error:
            raise ValueError(f"{episode}: {error}" if episode else str(error)) from error


def _read(file: Any, group: Any, options: Hdf5Options, episode: str, splits: tuple[str, ...]) -> Episode:
    key = _video_key(group, options)
    video = _frames(dataset(group, key), key)
    arrays: dict[str, Any] = {}
    for name, chosen, known in (
        ("actions", options.actions_key, ("actions", "action")),
        ("rewards", options.rewards_key, ("rewards", "reward")),
        ("dones", options.terminations_key, ("dones", "done")),
    ):
        found = chosen or next((name for name in known if name in group), None)
        if found is not None:
            arrays[name] = _array(dataset(group, found))
    arrays["video"] = video = (
        _with_next_frame(group, key, video, arrays.get("actions")) if options.next_frame else video
    )
    if options.flip:
        rows = 1 if video.shape[-1] == 3 else 2
        arrays["video"] = np.flip(video, rows)
    robomimic = _is_group(group, "obs")
    follows = robomimic if options.reward_follows_action is None else options.reward_follows_action
    metadata: dict[str, Any] = {"episode": episode} if episode else {}
    metadata |= {"splits": list(splits)} if splits else {}
    rewards = arrays.get("rewards")
    if follows and rewards is not None and len(rewards) == len(video):
        last = float(np.asarray(rewards[-1]).reshape(-1)[0])
        metadata["reward_after_last_frame"] = last
        if last and not np.asarray(rewards[:-1]).any():  # a success that is noted once, at the end, is not to be lost
            arrays["rewards"] = np.concatenate([np.zeros(len(video) - 1), [last]]).astype(np.float32)
            metadata["reward_rule"] = (
                "the one reward of the recording, which follows its last action, is at the last frame"
            )
    if "dones" in arrays:
        arrays["dones"] = _dones(arrays["dones"], len(video), follows)
    environment = _environment(file)
    metadata |= {"env_args": environment} if environment else {}
    kwargs = environment.get("env_kwargs")
    rate = kwargs.get("control_freq") if isinstance(kwargs, dict) else None
    plain = NpzOptions(
        video_key="video",
        reward_follows_action=follows and "reward_rule" not in metadata,
        fps=options.fps if options.fps is not None else (rate or 1.0),
        camera=options.camera or key,
        source=options.source or "hdf5",
        licence=options.licence,
    )
    return dataclasses.replace(episode_from_arrays(arrays, plain), metadata=metadata)


def _video_key(group: Any, options: Hdf5Options) -> str:
    """Path of the frames inside an episode's group."""
    images = _image_keys(group)
    there = f"images there: {', '.join(images) or 'none'}"
    if options.video_key is not None:
        if options.video_key not in group:
            raise ValueError(f"there is no {options.video_key!r}; {there}")
        return options.video_key
    if options.camera is not None:
        wanted = [f"obs/{options.camera}_image", f"obs/{options.camera}", options.camera]
        found = next((key for key in wanted if key in group), None)
        if found is None:
            raise ValueError(f"there is no camera {options.camera!r}; {there}")
        return found
    images = [key for key in images if key in options.preferred] or images
    if len(images) == 1:
        return images[0]
    if images:
        raise ValueError(f"several cameras: {', '.join(images)}; choose one with --camera or --video-key")
    if "states" in group:
        raise ValueError(
            "it holds simulator states but no images; render them with robomimic's dataset_states_to_obs.py first"
        )
    raise ValueError(f"no images among {sorted(group)}; name them with --video-key")


def _image_keys(group: Any) -> list[str]:
    """Paths of everything that looks like frames: (T, H, W, 3), (T, 3, H, W) or encoded, `next_obs` left out."""
    keys: list[str] = []

    def visit(name: str, item: Any) -> None:
        if not hasattr(item, "shape") or name.split("/")[0] == "next_obs":
            return
        if (item.ndim == 4 and 3 in (item.shape[1], item.shape[3])) or _is_encoded(item):
            keys.append(name)

    group.visititems(visit)  # follows no link out of the file
    return sorted(keys, key=natural)


def _is_encoded(item: Any) -> bool:
    """Whether a data set holds one string of bytes a frame (variable length, whole numbers of one byte)."""
    import h5py

    return item.ndim == 1 and h5py.check_vlen_dtype(item.dtype) == np.uint8


def _frames(item: Any, key: str) -> np.ndarray:
    if _is_encoded(item):
        return stack_frames((decode_image(bytes(data), f"{key}[{t}]") for t, data in enumerate(item)), key)
    return _array(item)


def _with_next_frame(group: Any, key: str, video: np.ndarray, actions: np.ndarray | None) -> np.ndarray:
    """Adds the frame that the last action led to, where robomimic's `next_obs` has it."""
    following = f"next_{key}" if key.startswith("obs/") else ""
    if actions is None or len(actions) != len(video) or not following or following not in group:
        return video
    item = dataset(group, following)
    if item.shape != video.shape or item.dtype != video.dtype:
        raise ValueError(f"{following} of shape {item.shape} does not fit {key} of shape {video.shape}")
    return np.concatenate([video, item[-1:]])


def _dones(dones: np.ndarray, length: int, follows: bool) -> np.ndarray:
    """Ends of the task in the schema's convention: True at the frame that ended it."""
    dones = dones.reshape(len(dones), -1)[:, 0].astype(bool)
    if follows and len(dones) in (length, length - 1):
        return np.concatenate([np.zeros(1, bool), dones[: length - 1]])
    return dones


def dataset(group: Any, key: str) -> Any:
    """The data set at a path, refused where its values lie outside of the file.

    Raises:
        ValueError: No data set, or one that points to other files.
    """
    if key not in group:
        raise ValueError(f"there is no {key!r}; it holds {sorted(group)}")
    item = group[key]
    if not hasattr(item, "shape") or not hasattr(item, "dtype"):
        raise ValueError(f"{key!r} is a group with {sorted(item)}; the path of its arrays is needed")
    if item.file.filename != group.file.filename or item.external or item.is_virtual:
        raise ValueError(f"{key!r} points to other files, which are not followed")
    return item


def _array(item: Any) -> np.ndarray:
    if item.dtype.kind not in "iufb":
        raise ValueError(f"{item.name} has the type {item.dtype}; numbers are needed")
    if item.ndim == 0:
        raise ValueError(f"{item.name} is one number, not one for each frame")
    if item.size * item.dtype.itemsize > MAX_BYTES:
        raise ValueError(f"{item.name} of shape {item.shape} takes more than {MAX_BYTES >> 20} MiB")
    return np.asarray(item[()])


def _is_group(parent: Any, name: str) -> bool:
    return name in parent and hasattr(parent[name], "keys")


def _groups(parent: Any) -> list[str]:
    return [name for name in parent if _is_group(parent, name)]


def _names(item: Any) -> set[str]:
    """Names in a filter key, which are fixed-length or variable strings."""
    return {value.decode() if isinstance(value, bytes) else str(value) for value in item[()]}


def _environment(file: Any) -> dict[str, Any]:
    """The `env_args` of robomimic, JSON in an attribute of `data`; empty where it is not there or not JSON."""
    text = file["data"].attrs.get("env_args", "{}") if _is_group(file, "data") else "{}"
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
