"""Reading HDF5: robomimic's layout as h5py writes it, VP2's, other key paths, and files that cannot be read."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ivideogpt.data.sources.hdf5 import Hdf5Options, hdf5_jobs, read_hdf5, vp2_jobs

h5py: Any = pytest.importorskip("h5py")

FRAMES = np.random.default_rng(0).integers(0, 256, (7, 8, 10, 3), dtype=np.uint8)


def robomimic(path: Path, video: np.ndarray, demos: int = 3, next_obs: bool = False, key: str = "agentview") -> Path:
    """The layout of robomimic's documentation (docs/datasets/overview), written with h5py; `video` has T+1 frames."""
    steps = len(video) - 1
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = demos * steps
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}})
        for i in range(demos):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = steps
            demo.create_dataset("obs/robot0_eef_pos", data=np.zeros((steps, 3)))
            demo.create_dataset(f"obs/{key}_image", data=video[:-1], compression="gzip")
            if next_obs:
                demo.create_dataset(f"next_obs/{key}_image", data=video[1:], compression="gzip")
            demo.create_dataset("actions", data=np.full((steps, 4), i / 10))
            demo.create_dataset("rewards", data=np.eye(steps)[-1])  # success at the end
            demo.create_dataset("dones", data=np.eye(steps)[-1].astype(np.int64))
        mask = file.create_group("mask")
        mask.create_dataset("train", data=np.array([f"demo_{i}" for i in range(1, demos)], dtype="S"))
        mask.create_dataset("valid", data=["demo_0"], dtype=h5py.string_dtype())
    return path


def test_robomimic(tmp_path: Path, shared: Path) -> None:
    video = np.load(shared / "data" / "bair_sample.npz", allow_pickle=False)["aux1_image"].astype(np.uint8)
    file = robomimic(tmp_path / "lift.hdf5", video, demos=11)
    jobs = hdf5_jobs(file)
    assert [name for name, _ in jobs] == [f"lift/data/demo_{i}" for i in range(11)]  # 10 after 9
    episode = jobs[2][1]()
    np.testing.assert_array_equal(episode.video, video[:-1])
    assert episode.actions is not None and episode.rewards is not None
    np.testing.assert_allclose(episode.actions, 0.2)
    # the last action's reward belongs to a frame that is not recorded: as the only one it stays with the last
    assert not episode.rewards[:-1].any() and episode.rewards[-1] == 1
    assert episode.metadata["reward_after_last_frame"] == 1
    assert episode.terminations is not None and not episode.terminations.any()
    assert (episode.fps, episode.camera, episode.source) == (20, "obs/agentview_image", "hdf5")
    assert episode.metadata["splits"] == ["train"] and episode.metadata["env_args"]["env_name"] == "Lift"


def test_next_obs_keeps_the_last_reward(tmp_path: Path) -> None:
    file = robomimic(tmp_path / "lift.hdf5", FRAMES, next_obs=True)
    episode = hdf5_jobs(file)[1][1]()
    np.testing.assert_array_equal(episode.video, FRAMES)
    assert episode.actions is not None and episode.rewards is not None and episode.terminations is not None
    assert not episode.actions[-1].any() and episode.actions[:-1].all()
    assert episode.rewards.tolist() == [0] * 6 + [1]
    assert episode.terminations.tolist() == [False] * 6 + [True]
    assert len(read_hdf5(file, Hdf5Options(next_frame=False), "data/demo_0")) == 6


def test_splits(tmp_path: Path) -> None:
    file = robomimic(tmp_path / "lift.hdf5", FRAMES)
    assert [name for name, _ in hdf5_jobs(file, Hdf5Options(split="train"))] == ["lift/data/demo_1", "lift/data/demo_2"]
    assert [name for name, _ in hdf5_jobs(file, Hdf5Options(split="valid"))] == ["lift/data/demo_0"]
    with pytest.raises(ValueError, match=r"no split 'test'; mask holds \['train', 'valid'\]"):
        hdf5_jobs(file, Hdf5Options(split="test"))[0][1]()
    with h5py.File(file, "a") as handle:
        del handle["data/demo_2"]
    with pytest.raises(ValueError, match=r"lift.hdf5: mask/train names 'demo_2', which is not there \(1 such\)"):
        hdf5_jobs(file, Hdf5Options(split="train"))[0][1]()


@pytest.mark.parametrize("key", ["camera", "agentview_shift_2"])
def test_vp2(tmp_path: Path, key: str) -> None:
    file = robomimic(tmp_path / "task.hdf5", FRAMES, next_obs=True, key=key)
    with h5py.File(file, "a") as handle:  # a second camera does not make VP2's choice unclear
        for name in handle["data"]:
            handle[f"data/{name}"].create_dataset("obs/other_image", data=FRAMES[:-1])
    jobs = vp2_jobs(tmp_path, Hdf5Options(split="train"))
    episode = jobs[0][1]()
    assert [name for name, _ in jobs] == ["task/data/demo_1", "task/data/demo_2"]
    assert (len(episode), episode.camera, episode.source) == (6, f"obs/{key}_image", "vp2")
    with pytest.raises(ValueError, match=rf"data/demo_0: several cameras: .*obs/{key}_image.*--camera"):
        hdf5_jobs(file)[0][1]()
    assert hdf5_jobs(file, Hdf5Options(camera="other"))[0][1]().camera == "other"


def test_other_key_paths(tmp_path: Path, shared: Path) -> None:
    """One episode a file, channels first, floats, encoded images, and a group of another name."""
    recording = sorted((shared / "data" / "metaworld").rglob("*.npz"))[0]
    arrays = np.load(recording, allow_pickle=False)
    video = np.ascontiguousarray(arrays["observation"][:20, 6:])
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["observations/images/top"] = video
        file["observations/qpos"] = np.zeros((20, 14))
        file["action"] = arrays["action"][1:20]
        file["score"] = np.arange(20.0)
    options = Hdf5Options(video_key="observations/images/top", rewards_key="score", fps=50, licence="MIT")
    episode = read_hdf5(tmp_path / "a.h5", options)
    np.testing.assert_array_equal(episode.video, video.transpose(0, 2, 3, 1))
    assert episode.actions is not None and not episode.actions[-1].any()
    np.testing.assert_array_equal(episode.rewards, np.arange(20))
    assert (episode.fps, episode.licence, episode.metadata) == (50, "MIT", {})
    flipped = read_hdf5(tmp_path / "a.h5", Hdf5Options(flip=True, rewards_key="score"))
    np.testing.assert_array_equal(flipped.video, episode.video[:, ::-1])

    with h5py.File(tmp_path / "b.h5", "w") as file:
        encoded = file.create_dataset("runs/x/rgb", (20,), dtype=h5py.vlen_dtype(np.uint8))
        for t, frame in enumerate(episode.video):
            buffer = io.BytesIO()
            Image.fromarray(frame).save(buffer, format="PNG")
            encoded[t] = np.frombuffer(buffer.getvalue(), np.uint8)
        file["runs/y/rgb"] = (episode.video / 255).astype(np.float32)
    jobs = hdf5_jobs(tmp_path / "b.h5", Hdf5Options(episodes="runs"))
    assert [name for name, _ in jobs] == ["b/runs/x", "b/runs/y"]
    for _, read in jobs:
        np.testing.assert_array_equal(read().video, episode.video)


def test_robosuite_recordings_without_images(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        file["data/demo_1/states"] = np.zeros((5, 32))
        file["data/demo_1/actions"] = np.zeros((5, 7))
    with pytest.raises(ValueError, match=r"states but no images; render them with .*dataset_states_to_obs"):
        hdf5_jobs(tmp_path)[0][1]()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, Hdf5Options(camera="wrist"), r"no camera 'wrist'; images there: obs/agentview_image"),
        ({}, Hdf5Options(video_key="obs/rgb"), r"no 'obs/rgb'; images there: obs/agentview_image"),
        ({}, Hdf5Options(video_key="obs"), r"'obs' is a group with \['agentview_image', 'robot0_eef_pos'\]"),
        ({}, Hdf5Options(actions_key="act"), r"no 'act'; it holds \['actions', 'dones', 'obs', 'rewards'\]"),
        ({"actions": np.zeros((4, 2))}, None, "actions has 4 rows for 6 frames"),
        ({"actions": np.full((6, 2), np.nan)}, None, "actions holds .*nan.* at frame 0"),
        ({"actions": np.array([b"x"] * 6)}, None, "numbers are needed"),
        ({"actions": np.float32(1)}, None, "is one number"),
        ({"rewards": np.zeros((6, 2))}, None, r"reward of shape \(6, 2\) does not fit 6 frames"),
        ({"dones": np.zeros(3)}, None, "terminations has 3 rows for 6 frames"),
        ({"obs/agentview_image": np.zeros((6, 8, 10))}, Hdf5Options(camera="agentview"), "must have 4 dimensions"),
        ({"next_obs/agentview_image": np.zeros((6, 4, 4, 3), np.uint8)}, None, "next_obs/agentview_image of shape"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, Any], options: Hdf5Options | None, message: str) -> None:
    file = robomimic(tmp_path / "bad.hdf5", FRAMES)
    with h5py.File(file, "a") as handle:
        for key, value in change.items():
            if f"data/demo_0/{key}" in handle:
                del handle[f"data/demo_0/{key}"]
            handle[f"data/demo_0/{key}"] = value
    with pytest.raises(ValueError, match=rf"bad.hdf5: data/demo_0: .*{message}"):
        hdf5_jobs(file, options)[0][1]()


def test_encoded_frames_that_cannot_be_used(tmp_path: Path) -> None:
    def png(height: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.resize(FRAMES, (height, 8, 3))).save(buffer, format="PNG")
        return buffer.getvalue()

    cases = [([png(8), png(9)], "mixes resolutions: frame 0 is 8 x 8 .* frame 1 is 9 x 8"), ([b"GIF89a"], "no JPEG")]
    cases.append(([png(8)[:120]], "does not decode"))
    for images, message in cases:
        with h5py.File(tmp_path / "x.h5", "w") as file:
            encoded = file.create_dataset("rgb", (len(images),), dtype=h5py.vlen_dtype(np.uint8))
            for t, data in enumerate(images):
                encoded[t] = np.frombuffer(data, np.uint8)
        with pytest.raises(ValueError, match=message):
            read_hdf5(tmp_path / "x.h5")


def test_links_out_of_the_file_are_not_followed(tmp_path: Path) -> None:
    robomimic(tmp_path / "secret.hdf5", FRAMES)
    (tmp_path / "raw").write_bytes(bytes(6 * 8 * 10 * 3))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["linked"] = h5py.ExternalLink("secret.hdf5", "/data/demo_0/obs/agentview_image")
        file.create_dataset("external", (6, 8, 10, 3), np.uint8, external=[(str(tmp_path / "raw"), 0, 1440)])
    for key in ("linked", "external"):
        with pytest.raises(ValueError, match="points to other files"):
            read_hdf5(tmp_path / "x.h5", Hdf5Options(video_key=key))


def test_damaged_files(tmp_path: Path) -> None:
    """Each is one job that raises, beside the jobs of the whole file."""
    whole = robomimic(tmp_path / "whole.hdf5", FRAMES).read_bytes()
    for name, data in {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}.items():
        (tmp_path / f"{name}.h5").write_bytes(data)
    jobs = dict(hdf5_jobs(tmp_path))
    assert len(jobs) == 6
    for name in ("cut", "empty", "text"):
        with pytest.raises(ValueError, match=f"{name}.h5: "):
            jobs[name]()
    file = tmp_path / "flipped.hdf5"
    with h5py.File(file, "w") as handle:
        handle.create_dataset("rgb", data=FRAMES, chunks=FRAMES.shape, compression="gzip", fletcher32=True)
        offset = handle["rgb"].id.get_chunk_info(0).byte_offset
    damaged = bytearray(file.read_bytes())
    damaged[offset + 100] ^= 0xFF
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"flipped.hdf5: "):
        read_hdf5(file)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no .hdf5 or .h5 file"):
        hdf5_jobs(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        hdf5_jobs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there is no file"):
        read_hdf5(tmp_path / "x.h5")
    file = robomimic(tmp_path / "x.h5", FRAMES)
    with pytest.raises(ValueError, match="there is no episode 'data/demo_9'"):
        read_hdf5(file, None, "data/demo_9")
    with pytest.raises(ValueError, match=r"no group 'runs'; it holds \['data', 'mask'\]"):
        hdf5_jobs(file, Hdf5Options(episodes="runs"))[0][1]()


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = robomimic(tmp_path / "x.h5", FRAMES)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"pip install 'ivideogpt\[hdf5\]'"):
        hdf5_jobs(file)
