"""Reads RLDS data sets as tensorflow-datasets writes them (Open X-Embodiment, any robot's), without TensorFlow.

A folder holds `features.json`, `dataset_info.json` and TFRecord files with one episode a record. What is read:

    video         the image `steps/observation/KEY`: `video_key`; or the data set's row in `oxe.yaml`; or the only image
                  there is; or `image`
    actions       every number under `steps/action`, sorted by key path (part by part), each array row-major; the
                  names of the columns are the metadata's `action_names`, such as `base/mode[1]`, beside `action_rule`
    rewards       `steps/reward`. RLDS gives step t the reward of the action taken there, so it moves down by one; but
                  where the first is 0 and the last is not, as in a sparse reward of success that was written on
                  arrival, it stays. `reward_follows_action` decides otherwise. The metadata hold the rule and,
                  where the move pushed one out that is not 0, `last_reward`
    terminations  `steps/is_terminal`, or `steps/discount` = 0 where there is none
    metadata      texts of the steps (one if all are the same), texts and numbers of the episode, the numbers of the
                  steps with `is_first` and `is_last`, and in `left_out` the features that an episode has no place for
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ivideogpt.data.episode import Episode
from ivideogpt.data.sources.rlds_features import Leaf, decode_frames, decode_numbers, decode_texts, read_features
from ivideogpt.data.sources.tfrecord import Feature, RecordJobs, parse_example

SUFFIX = "_converted_externally_to_rlds"
OBSERVATION, ACTION = "steps/observation/", "steps/action"
FLAGS = ("is_first", "is_last")
READ = {f"steps/{name}" for name in ("reward", "discount", "is_first", "is_last", "is_terminal")}


@dataclasses.dataclass(frozen=True)
class RldsOptions:
    """How to read a data set where its files do not say it themselves.

    Args:
        video_key: Image in the observation (`image`, `cameras/wrist`); None: see the top of this file.
        reward_follows_action: Whether reward[t] belongs to the action taken at frame t; None: judged by its ends.
        fps: Frames a second; None: those of `oxe.yaml`, else 1.
        camera: Camera name; None: the key.
        source: Where the recordings come from; None: the data set's name.
        licence: Their licence; None: that of dataset_info.json, else `unknown`.
        split: The one split to read; None: all.
    """

    video_key: str | None = None
    reward_follows_action: bool | None = None
    fps: float | None = None
    camera: str | None = None
    source: str | None = None
    licence: str | None = None
    split: str | None = None


@dataclasses.dataclass(frozen=True)
class RldsFolder:
    """What the two JSON files of a data set say: its name, licence, features and (file, split, shard, records)."""

    name: str
    licence: str
    leaves: dict[str, Leaf]
    shards: list[tuple[Path, str, int, int]]


def read_rlds(path: str | Path, options: RldsOptions | None = None) -> Iterator[Episode]:
    """Reads the episodes of a data set in turn.

    Raises:
        ValueError: Not such a folder, no such camera, or a damaged file; the message names it.
    """
    for _, read in rlds_jobs(path, options)[0]:
        yield read()


def rlds_jobs(path: str | Path, options: RldsOptions | None = None) -> tuple[RecordJobs, int]:
    """The episodes of a data set as (key, how to read it), and how many dataset_info.json says there are.

    Raises:
        ValueError: Not such a folder, no such split or camera.
    """
    options = options or RldsOptions()
    folder = open_folder(path)
    splits = sorted({split for _, split, _, _ in folder.shards})
    if options.split is not None and options.split not in splits:
        raise ValueError(f"{path} has no split {options.split!r}; it has {', '.join(splits)}")
    decode = partial(episode_from_record, folder=folder, options=options)
    choose_camera(folder, options.video_key)  # a wrong name is told before anything is read
    shards = [shard for shard in folder.shards if options.split in (None, shard[1])]
    files = tuple((file, f"{split}-{number:05d}", count) for file, split, number, count in shards)
    return RecordJobs(files, decode), sum(count for *_, count in shards)


def rlds_cameras(path: str | Path, options: RldsOptions | None = None) -> list[str]:
    """Names of the cameras that features.json says there are."""
    leaves = open_folder(path).leaves
    return [name.removeprefix(OBSERVATION) for name, leaf in leaves.items() if _is_camera(name, leaf)]


@cache
def oxe_table() -> dict[str, dict[str, Any]]:
    """Rows of `oxe.yaml` by name: camera, rate, stride and, in the mixture `select`, weight."""
    import yaml

    return yaml.safe_load(Path(__file__).with_name("oxe.yaml").read_text(encoding="utf-8"))


def oxe_row(name: str) -> dict[str, Any] | None:
    """The row of a data set, whose own name may go on after the table's: `stanford_hydra_dataset_converted_...`."""
    name, table = name.removesuffix(SUFFIX), oxe_table()
    found = [entry for entry in table if name == entry or name.startswith(f"{entry}_")]
    return table[max(found, key=len)] if found else None


def open_folder(path: str | Path) -> RldsFolder:
    """Reads the JSON files of a data set; `path` is its folder, or one above that holds no other.

    Raises:
        ValueError: No data set or several there, JSON that says something else, or another kind of files.
    """
    path = Path(path)
    found = [path]
    if not (path / "features.json").is_file():
        found = sorted(file.parent for file in path.rglob("features.json"))
    if not found:
        raise ValueError(f"{path} holds no features.json" if path.is_dir() else f"there is no folder {path}")
    if len(found) > 1:
        raise ValueError(f"{path} holds several data sets, name one of {', '.join(map(str, found))}")
    folder = found[0]
    leaves = read_features(_json(folder / "features.json"), folder / "features.json")
    info_file = folder / "dataset_info.json"
    info = _json(info_file)
    kind = info.get("fileFormat", "tfrecord")
    if kind != "tfrecord":
        raise ValueError(f"{info_file}: files of the format {kind!r} cannot be read, only tfrecord")
    try:
        name, shards = str(info["name"]), []
        for split in info["splits"]:
            counts = [int(count) for count in split["shardLengths"]]
            template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
            for number, count in enumerate(counts):
                words = {"DATASET": name, "SPLIT": split["name"], "FILEFORMAT": kind, "SHARD_INDEX": f"{number:05d}"}
                words |= {"NUM_SHARDS": f"{len(counts):05d}", "SHARD_X_OF_Y": f"{number:05d}-of-{len(counts):05d}"}
                file = template.format(**words)
                if Path(file).name != file or not str(split["name"]).isidentifier():
                    raise ValueError(f"{file!r} of split {split['name']!r} is no plain file name")
                shards.append((folder / file, str(split["name"]), number, count))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{info_file}: cannot tell the files of its splits: {error!r}") from error
    if not shards:
        raise ValueError(f"{info_file}: no split has a shard with episodes")
    licence = (info.get("redistributionInfo") or {}).get("license") or "unknown"
    return RldsFolder(name, str(licence), leaves, shards)


def choose_camera(folder: RldsFolder, key: str | None) -> str:
    """Name of the camera to read, by the rule at the top of this file.

    Raises:
        ValueError: There is no such image, or none can be chosen; the message lists those there.
    """
    cameras = [name.removeprefix(OBSERVATION) for name, leaf in folder.leaves.items() if _is_camera(name, leaf)]
    if key is None:
        of_table = (oxe_row(folder.name) or {}).get("camera")
        if isinstance(of_table, str):
            key = of_table
        elif len(cameras) == 1:
            key = cameras[0]
        elif of_table is None and "image" in cameras:
            key = "image"
    if key not in cameras:
        problem = "needs the name of a camera" if key is None else f"has no camera {key!r}"
        raise ValueError(f"{folder.name} {problem}; those there are {sorted(cameras)}; name it with --camera")
    return key


def _is_camera(name: str, leaf: Leaf) -> bool:
    picture = leaf.kind == "image" or (leaf.kind == "tensor" and len(leaf.shape) == 3)
    return name.startswith(OBSERVATION) and picture and leaf.dtype == "uint8" and leaf.shape[-1:] == (3,)


def episode_from_record(data: bytes, key: str, folder: RldsFolder, options: RldsOptions) -> Episode:
    """Makes an episode of a serialised tf.train.Example; `key` goes into the metadata.

    Raises:
        ValueError: The record does not hold what features.json says.
    """
    leaves, row = folder.leaves, oxe_row(folder.name) or {}
    camera = choose_camera(folder, options.video_key)
    view = OBSERVATION + camera
    actions = sorted((name for name in leaves if _is_action(name)), key=lambda name: name.split("/"))
    texts = [name for name, leaf in leaves.items() if leaf.is_text]
    facts = [name for name, leaf in leaves.items() if not name.startswith("steps/") and leaf.is_small]
    used = {view, *READ, *texts, *facts, *(name for name in actions if leaves[name].is_number)}
    features = parse_example(data, used)

    video = decode_frames(features, view, leaves[view])
    length = len(video)
    numbers = {name: decode_numbers(features, name, leaves[name], length) for name in READ & leaves.keys()}
    metadata: dict[str, Any] = {"record": key, "dataset": folder.name}
    metadata["action_rule"] = "sorted by key path, row-major"
    values, metadata["action_names"] = _actions(features, [name for name in actions if name in used], leaves, length)
    for flag in FLAGS:
        if f"steps/{flag}" in numbers:
            metadata[flag] = np.flatnonzero(numbers[f"steps/{flag}"]).tolist()
    rewards = None
    if "steps/reward" in numbers:
        rewards, facts_of_rewards = _rewards(numbers["steps/reward"], length, options.reward_follows_action)
        metadata |= facts_of_rewards
    terminations = None
    if "steps/is_terminal" in numbers:
        terminations = numbers["steps/is_terminal"].reshape(length).astype(bool)
    elif "steps/discount" in numbers:
        terminations = numbers["steps/discount"].reshape(length) == 0
    for name in sorted(texts + facts):
        of_steps = name.startswith("steps/")
        if leaves[name].is_text:
            words: Any = decode_texts(features, name, length if of_steps else 1)
            words = words[0] if len(set(words)) == 1 else words
        else:
            words = decode_numbers(features, name, leaves[name], 1)[0].tolist()
        metadata[name.removeprefix("steps/")] = words
    metadata["left_out"] = sorted(leaves.keys() - used)
    return Episode(
        video=video,
        actions=values,
        rewards=rewards,
        terminations=terminations,
        fps=float(row.get("rate", 1.0) if options.fps is None else options.fps),
        camera=options.camera or camera,
        source=options.source or folder.name,
        licence=options.licence or folder.licence,
        metadata=metadata,
    )


def _is_action(name: str) -> bool:
    return name == ACTION or name.startswith(f"{ACTION}/")


def _actions(
    features: dict[str, Feature], names: list[str], leaves: dict[str, Leaf], length: int
) -> tuple[np.ndarray | None, list[str]]:
    """All actions (T, A) side by side and the names of their columns."""
    columns: list[str] = []
    parts: list[np.ndarray] = []
    for name in names:
        array = decode_numbers(features, name, leaves[name], length)
        label = name.removeprefix("steps/").removeprefix("action/")
        places = [f"[{','.join(map(str, place))}]" if place else "" for place in np.ndindex(*array.shape[1:])]
        columns += [label + place for place in places]
        parts.append(array.reshape(length, -1).astype(np.float32))
    if not columns:
        return None, []
    return np.concatenate(parts, axis=1), columns


def _rewards(raw: np.ndarray, length: int, follows_action: bool | None) -> tuple[np.ndarray, dict[str, Any]]:
    """Rewards (T,) on arriving at each frame, and what the metadata should tell of it."""
    if raw.size != length:
        raise ValueError(f"steps/reward of shape {raw.shape} is not one number a step")
    raw = raw.reshape(length).astype(np.float32)
    if follows_action is None:
        follows_action = bool(raw[0] != 0 or raw[-1] == 0 or not np.isfinite(raw[-1]))
    if not follows_action:
        return raw, {"reward_rule": "on arrival"}
    facts: dict[str, Any] = {"reward_rule": "of the action taken"}
    if np.isfinite(raw[-1]) and raw[-1] != 0:
        facts["last_reward"] = float(raw[-1])
    return np.concatenate([np.zeros(1, np.float32), raw[:-1]]), facts


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a JSON object is needed, got {type(content).__name__}")
    return content
