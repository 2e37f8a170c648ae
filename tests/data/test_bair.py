"""Reading BAIR's softmotion records, written by TensorFlow (see fixtures/make_rlds.py)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ivideogpt.data.shards import KEY_PATTERN
from ivideogpt.data.sources.bair import bair_jobs, read_bair
from ivideogpt.data.sources.npz import NpzOptions

FIXTURES = Path(__file__).parent / "fixtures"
FILE = FIXTURES / "bair" / "train" / "traj_0_to_1.tfrecords"


@pytest.mark.parametrize("camera", ["image_aux1", "image_main"])
def test_episodes(camera: str) -> None:
    expected = np.load(FIXTURES / "bair_expected.npz", allow_pickle=False)
    episodes = list(read_bair(FILE, NpzOptions(video_key=camera, fps=10.0, licence="mine")))
    assert [len(episode) for episode in episodes] == [30, 4]
    for number, episode in enumerate(episodes):
        assert episode.resolution == (12, 12)
        flat = episode.video.reshape(len(episode), -1).astype(np.int64)
        np.testing.assert_array_equal(flat @ np.arange(flat.shape[1]), expected[f"{number}/{camera}"])
        np.testing.assert_array_equal(episode.actions, expected[f"{number}/action"])
        positions = np.float32(episode.metadata["endeffector_pos"])
        np.testing.assert_array_equal(positions, expected[f"{number}/endeffector_pos"])
        assert episode.rewards is None
        assert (episode.camera, episode.source, episode.licence, episode.fps) == (camera, "bair", "mine", 10.0)


def test_default_camera() -> None:
    first = next(read_bair(FILE))
    assert first.camera == "image_aux1"
    np.testing.assert_array_equal(first.video, next(read_bair(FILE, NpzOptions(video_key="image_aux1"))).video)


def test_jobs_of_a_folder(tmp_path: Path) -> None:
    for name in ("traj_256_to_511", "traj_1024_to_1279"):
        shutil.copy(FILE, tmp_path / f"{name}.tfrecords")
    jobs, total = bair_jobs(tmp_path)
    found = list(jobs)
    assert total is None
    keys = [key for key, _ in found]
    assert keys == [f"traj_{name}-0000{i}" for name in ("256_to_511", "1024_to_1279") for i in (0, 1)]
    assert all(KEY_PATTERN.match(key) for key in keys)
    assert [len(read()) for _, read in found] == [30, 4, 30, 4]
    assert found[0][1]().metadata["record"] == keys[0]
    assert next(iter(bair_jobs(FIXTURES / "bair")[0]))[0] == "train_traj_0_to_1-00000"


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no frame 0/hand/encoded; the cameras .* \['image_aux1', 'image_main'\]"):
        list(read_bair(FILE, NpzOptions(video_key="hand")))
    with pytest.raises(ValueError, match="holds no .tfrecords file"):
        bair_jobs(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        bair_jobs(tmp_path / "none")
    other = FIXTURES / "toto" / "1.0.0" / "toto-train.tfrecord-00000-of-00001"
    with pytest.raises(ValueError, match=re.escape(str(other)) + r".*has no frame 0/image_aux1/encoded"):
        list(read_bair(other))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (b"2/image_aux1/encoded", b"2/image_auxx/encoded", "has a frame 3, but 2/image_aux1/encoded is missing"),
        (b"1/action", b"1/actixn", "action must be as many floats in each of the 4 frames"),
    ],
)
def test_wrong_records(old: bytes, new: bytes, text: str) -> None:
    """Records that are whole but no trajectory."""
    from ivideogpt.data.sources.bair import episode_from_record
    from ivideogpt.data.sources.tfrecord import read_records

    data = list(read_records(FILE))[1].replace(old, new)
    with pytest.raises(ValueError, match=text):
        episode_from_record(data, "here", NpzOptions())


def test_damaged_file(tmp_path: Path) -> None:
    file = tmp_path / "traj_0_to_1.tfrecords"
    data = bytearray(FILE.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="traj_0_to_1.tfrecords: the data of the record at byte 0 do not fit"):
        list(read_bair(file))
    jobs = list(bair_jobs(file)[0])
    with pytest.raises(ValueError, match="do not fit their checksum"):
        jobs[0][1]()
    assert len(jobs[1][1]()) == 4  # the other record is still there
