"""Reading RLDS folders written by tensorflow-datasets against its own decoding, and folders with faults."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivideogpt.data.shards import KEY_PATTERN
from ivideogpt.data.sources.rlds import RldsOptions, open_folder, oxe_row, oxe_table, read_rlds, rlds_jobs
from ivideogpt.data.sources.rlds_features import Leaf, decode_frames, decode_numbers, read_features

FIXTURES = Path(__file__).parent / "fixtures"
ROBOT = FIXTURES / "rlds_robot"
NAMES = [  # sorted by key path, row-major
    *("base/mode[0]", "base/mode[1]", "base/stop", "gripper"),
    *("rotation[0,0]", "rotation[0,1]", "rotation[1,0]", "rotation[1,1]"),
    *("world_vector[0]", "world_vector[1]", "world_vector[2]"),
]
COUNTS = {"train": 3, "test": 2}


def expected(name: str) -> dict[str, np.ndarray]:
    """What tensorflow-datasets decodes."""
    arrays = np.load(FIXTURES / f"{name}_expected.npz", allow_pickle=False)
    return {
        name: np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array for name, array in arrays.items()
    }


@pytest.mark.parametrize(("camera", "tolerance"), [("image", 2), ("cameras/wrist", 0), ("raw", 0)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_equals_tensorflow_datasets(split: str, camera: str, tolerance: int) -> None:
    oracle = expected("rlds_robot")
    episodes = list(read_rlds(ROBOT, RldsOptions(video_key=camera, split=split)))
    assert len(episodes) == COUNTS[split]
    for number, episode in enumerate(episodes):
        values = {name[len(f"{split}/{number}/") :]: v for name, v in oracle.items() if f"{split}/{number}/" in name}
        frames = values[f"steps/observation/{camera}"]
        assert episode.video.shape == frames.shape
        assert np.abs(episode.video.astype(int) - frames).max() <= tolerance  # JPEG decoders round differently
        columns = [
            values[f"steps/action/{key}"].reshape(len(frames), -1)
            for key in ("base/mode", "base/stop", "gripper", "rotation", "world_vector")
        ]
        np.testing.assert_array_equal(episode.actions, np.concatenate(columns, 1).astype(np.float32))
        np.testing.assert_array_equal(episode.rewards, values["steps/reward"])
        np.testing.assert_array_equal(episode.terminations, values["steps/is_terminal"])
        metadata = episode.metadata
        assert metadata["action_names"] == NAMES
        assert metadata["action_rule"] == "sorted by key path, row-major"
        for flag in ("is_first", "is_last"):
            assert metadata[flag] == np.flatnonzero(values[f"steps/{flag}"]).tolist()
        assert (
            metadata["observation/natural_language_instruction"]
            == (values["steps/observation/natural_language_instruction"][0])
        )
        phases = values["steps/phase"].tolist()
        assert metadata["phase"] == (phases if len(set(phases)) > 1 else phases[0])
        for name in ("file_path", "success", "seed", "goal"):
            assert metadata[f"episode_metadata/{name}"] == values[f"episode_metadata/{name}"].tolist()
        assert metadata["reward_rule"] == "on arrival"
        assert "steps/observation/state" in metadata["left_out"] and "steps/observation/depth" in metadata["left_out"]
        assert (episode.source, episode.licence, episode.camera) == ("rlds_robot", "CC-BY-4.0", camera)


def test_flat_data_set_of_the_table() -> None:
    """A flat action; rewards of the action taken; camera and rate from the table of Open X-Embodiment."""
    oracle = expected("toto")
    (episode,) = read_rlds(FIXTURES / "toto" / "1.0.0")
    np.testing.assert_array_equal(episode.video, oracle["train/0/steps/observation/image"])
    np.testing.assert_array_equal(episode.actions, oracle["train/0/steps/action"])
    assert episode.metadata["action_names"] == [f"action[{i}]" for i in range(7)]
    assert episode.rewards is not None
    assert episode.rewards.tolist() == [0, 1, 2, 3]
    assert (episode.metadata["reward_rule"], episode.metadata["last_reward"]) == ("of the action taken", 4.0)
    assert (episode.fps, episode.camera, episode.licence) == (30.0, "image", "unknown")
    assert episode.metadata["left_out"] == ["steps/language_embedding"]


def test_options() -> None:
    options = RldsOptions(None, True, 7.5, "front", "mine", "CC0-1.0", "test")
    first = next(read_rlds(ROBOT, options))
    assert (first.fps, first.camera, first.source, first.licence) == (7.5, "front", "mine", "CC0-1.0")
    assert first.rewards is not None
    assert not first.rewards.any()  # moved down, the last one is pushed out ...
    assert first.metadata["last_reward"] == 1  # ... and told
    with pytest.raises(ValueError, match="rewards.0. is 1"):
        next(read_rlds(FIXTURES / "toto", RldsOptions(reward_follows_action=False)))


def test_jobs() -> None:
    jobs, total = rlds_jobs(ROBOT)
    found = list(jobs)
    assert len(found) == total == 5
    keys = [key for key, _ in found]
    assert keys[:3] == ["train-00000-00000", "train-00000-00001", "train-00001-00000"]
    assert keys[3:] == ["test-00000-00000", "test-00001-00000"]
    assert all(KEY_PATTERN.match(key) for key in keys)
    assert found[3][1]().metadata["record"] == "test-00000-00000"


@pytest.fixture
def robot(tmp_path: Path) -> Path:
    """A copy of the data set that a test may damage."""
    return Path(shutil.copytree(ROBOT / "1.0.0", tmp_path / "robot"))


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def steps_of(content: dict[str, Any]) -> dict[str, Any]:
    return content["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]


def test_cameras_are_listed(robot: Path) -> None:
    with pytest.raises(ValueError, match=r"has no camera 'hand'.*\['cameras/wrist', 'image', 'raw'\].*--camera"):
        rlds_jobs(robot, RldsOptions(video_key="hand"))
    with pytest.raises(ValueError, match="has no camera 'depth'"):
        rlds_jobs(robot, RldsOptions(video_key="depth"))

    def rename(content: dict[str, Any]) -> None:
        observation = steps_of(content)["observation"]["featuresDict"]["features"]
        observation["front"] = observation.pop("image")

    change(robot / "features.json", rename)
    with pytest.raises(ValueError, match="needs the name of a camera; those there are"):
        rlds_jobs(robot)
    # a name that features.json promises and the record does not hold
    with pytest.raises(ValueError, match="record at byte 0: the record has no steps/observation/front"):
        next(read_rlds(robot, RldsOptions(video_key="front")))


@pytest.mark.parametrize(
    ("name", "feature", "text"),
    [
        ("reward", {"tensor": {"dtype": "string", "shape": {}}}, "steps/reward: .* cannot be read as numbers"),
        ("reward", {"tensor": {"dtype": "float32", "shape": {"dimensions": ["2"]}}}, "5 numbers; 5 of shape .2,. are"),
        ("phase", {"tensor": {"dtype": "float32", "shape": {}}}, None),
        ("is_last", {"text": {}}, "steps/is_last"),
        ("discount", {"text": {}}, "steps/discount"),
    ],
)
def test_wrong_features(robot: Path, name: str, feature: dict[str, Any], text: str | None) -> None:
    change(robot / "features.json", lambda content: steps_of(content).update({name: feature}))
    if text is None:  # a number that is not read is of no concern
        next(read_rlds(robot))
        return
    with pytest.raises(ValueError, match=text):
        next(read_rlds(robot))


def test_wrong_image_size_and_kind(robot: Path) -> None:
    def grow(content: dict[str, Any]) -> None:
        image = steps_of(content)["observation"]["featuresDict"]["features"]["image"]["image"]
        image["shape"]["dimensions"][0] = "480"

    change(robot / "features.json", grow)
    with pytest.raises(ValueError, match="image, frame 0 does not decode: 16 x 24 pixels, features.json says .480"):
        next(read_rlds(robot, RldsOptions(video_key="image")))


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda info: info.update(fileFormat="array_record"), "format 'array_record' cannot be read"),
        (lambda info: info.pop("splits"), "cannot tell the files of its splits: KeyError"),
        (lambda info: info["splits"][0].update(shardLengths=["two"]), "cannot tell the files"),
        (lambda info: info["splits"][0].update(filepathTemplate="../{SPLIT}"), "is no plain file name"),
        (lambda info: info["splits"][0].update(filepathTemplate="{X}"), "cannot tell the files"),
        (lambda info: info.update(splits=[]), "no split has a shard"),
    ],
)
def test_wrong_info(robot: Path, edit: Callable[[dict[str, Any]], Any], text: str) -> None:
    change(robot / "dataset_info.json", edit)
    with pytest.raises(ValueError, match=text):
        open_folder(robot)


def test_wrong_folders(robot: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no split 'val'; it has test, train"):
        rlds_jobs(robot, RldsOptions(split="val"))
    shutil.copytree(robot, tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds several data sets, name one of .*other, .*robot"):
        rlds_jobs(tmp_path)
    (robot / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match="there is no file .*dataset_info.json"):
        rlds_jobs(robot)
    for content in ("{", "[]", "{}", '{"featuresDict": {"features": {"x": {"text": {}}}}}'):
        (robot / "features.json").write_text(content)
        with pytest.raises(ValueError, match="features.json"):
            rlds_jobs(robot)
    (robot / "features.json").unlink()
    with pytest.raises(ValueError, match="holds no features.json"):
        rlds_jobs(robot)
    with pytest.raises(ValueError, match="there is no folder"):
        rlds_jobs(tmp_path / "none")


def test_damaged_shards(robot: Path) -> None:
    first = robot / "rlds_robot-train.tfrecord-00000-of-00002"
    data = bytearray(first.read_bytes())
    data[100] ^= 1
    first.write_bytes(data)
    (robot / "rlds_robot-train.tfrecord-00001-of-00002").unlink()
    cut = robot / "rlds_robot-test.tfrecord-00000-of-00002"
    cut.write_bytes(cut.read_bytes()[:-9])
    results: dict[str, Any] = {}
    for key, read in rlds_jobs(robot)[0]:
        try:
            results[key] = len(read())
        except ValueError as error:
            results[key] = str(error)
    assert results.pop("train-00000-00001") == 4 and results.pop("test-00001-00000") == 3  # the others are read
    texts = ["byte 0 do not fit their checksum", "there is no file", "the record at byte 0 is cut off"]
    assert list(results) == ["train-00000-00000", "train-00001-rest-after-0", "test-00000-rest-after-0"]
    for text, message in zip(texts, results.values(), strict=True):
        assert text in message
    change(robot / "dataset_info.json", lambda info: info["splits"][1].update(shardLengths=["1", "7"]))
    with pytest.raises(ValueError, match="holds 1 records, but 7 are said to be there"):
        dict(rlds_jobs(robot)[0])["test-00001-count"]()


def test_frames_that_do_not_decode() -> None:
    data = Path(FIXTURES / "toto" / "1.0.0" / "toto-train.tfrecord-00000-of-00001").read_bytes()
    start = data.index(b"\x89PNG")
    image = data[start : data.index(b"IEND", start) + 8]
    leaf = Leaf("image", (None, None, 3), "uint8")
    whole = decode_frames({"x": [memoryview(image)]}, "x", leaf)
    assert whole.shape == (1, 12, 16, 3)
    for broken in (image[:60], b"", b"GIF89a", image[:-30]):
        with pytest.raises(ValueError, match="x, frame 1 does not decode"):
            decode_frames({"x": [memoryview(image), memoryview(broken)]}, "x", leaf)
    with pytest.raises(ValueError, match="the episode is empty"):
        decode_frames({"x": np.zeros(0, np.float32)}, "x", leaf)
    with pytest.raises(ValueError, match="holds byte strings where features.json says float32"):
        decode_numbers({"x": [memoryview(image)]}, "x", Leaf("tensor", (), "float32"), 1)


def test_kinds_of_features() -> None:
    steps = {
        "label": {"pythonClassName": "ClassLabel", "classLabel": {"numClasses": "3"}},
        "old": {"tensor": {"shape": {"dimensions": ["-1", "3"]}, "dtype": "float32", "encoding": "none"}},
        "coded": {"tensor": {"shape": {"dimensions": ["3"]}, "dtype": "float32", "encoding": "zlib"}},
        "list": {"sequence": {"feature": {"text": {}}, "length": "-1"}},
        "brain": {"tensor": {"shape": {}, "dtype": "bfloat16"}},
    }
    node = {"featuresDict": {"features": steps}}
    content = {"featuresDict": {"features": {"steps": {"sequence": {"feature": node}}}}}
    leaves = read_features(content, Path("features.json"))
    assert leaves["steps/label"] == Leaf("tensor", (), "int64")
    assert leaves["steps/old"].shape == (None, 3)
    numbers = [name for name, leaf in leaves.items() if leaf.is_number]
    assert numbers == ["steps/label"]
    assert not any(leaf.is_text for leaf in leaves.values())


def test_rows_of_the_table() -> None:
    assert oxe_row("stanford_hydra_dataset_converted_externally_to_rlds") is oxe_table()["stanford_hydra"]
    assert oxe_row("fractal20220817_data") is oxe_table()["fractal20220817_data"]
    assert oxe_row("ucsd_pick_and_place_dataset_converted_externally_to_rlds") is oxe_table()["ucsd_pick_and_place"]
    assert oxe_row("totora") is oxe_row("my_robot") is None


def test_table_agrees_with_the_facts(shared: Path) -> None:
    """Names, rates, strides, cameras and weights are those of facts.md."""
    file = shared / "facts.md"
    if not file.is_file():
        pytest.skip(f"no {file}")
    text = re.sub(r"\s+", " ", file.read_text(encoding="utf-8"))
    table = {name.replace("fractal20220817_data", "fractal"): row for name, row in oxe_table().items()}
    rates = re.findall(r"(\w+) ([\d.]+)", text.split("Rates (Hz): ")[1].split(" (most carry")[0])
    assert {name: float(rate) for name, rate in rates} == {name: row["rate"] for name, row in table.items()}
    assert len(table) == 39
    for row in table.values():
        assert row["stride"] == max(round(row["rate"] / 3), 1)
        assert set(row) - {"weight"} == {"camera", "rate", "stride"}
    mixture = text.split("it alone): ")[1].split(". Every 100th")[0]
    large, small = mixture.split(", and 0.20 shared equally by 31 small sets: ")
    weights = {name: float(weight) for name, weight in re.findall(r"(\w+) ([\d.]+)", large)}
    for entry in small.split(", "):
        name, _, times = entry.partition(" x")
        weights[name] = 0.20 / 31 * int(times or 1)
    assert {name: row["weight"] for name, row in table.items() if "weight" in row} == pytest.approx(weights, rel=1e-5)
    assert sum(weights.values()) == pytest.approx(1)
    others = dict(re.findall(r"(taco_play|roboturk|viola|language_table) `(\w+)`", text))
    assert len(others) == 4
    others["uiuc_d3field"] = [f"image_{i}" for i in range(1, 5)]
    assert {name: row["camera"] for name, row in table.items() if row["camera"] != "image"} == others
