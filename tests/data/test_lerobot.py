"""LeRobotDatasets that lerobot itself wrote (fixtures/lerobot/make.py): read, packed, and refused where damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivideogpt.data.packing import pack
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.sources.lerobot import LerobotOptions, lerobot_cameras, lerobot_jobs, read_info
from ivideogpt.data.verification import verify_set

FIXTURES = Path(__file__).parent / "fixtures" / "lerobot"
LENGTHS = (6, 9, 4)
TOP, WRIST = "observation.images.top", "observation.images.wrist"


def picture(episode: int, time: int, camera: int) -> np.ndarray:
    """What make.py drew."""
    drawn = np.full((48, 64, 3), 40 + 60 * camera, np.uint8)
    drawn[8 + 4 * episode : 24 + 4 * episode, 4 * time : 4 * time + 16] = (200, 30 + 70 * episode, 60)
    return drawn


def drawn(episode: int, camera: int) -> np.ndarray:
    return np.stack([picture(episode, time, camera) for time in range(LENGTHS[episode])])


@pytest.fixture(params=["video", "image"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def change_info(folder: Path, **changes: Any) -> None:
    path = folder / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_recorded_comes_out(kind: str) -> None:
    assert lerobot_cameras(FIXTURES / kind) == [TOP, WRIST]
    for camera, key in enumerate((TOP, WRIST)):
        jobs = lerobot_jobs(FIXTURES / kind, LerobotOptions(camera=key))
        assert [name for name, _ in jobs] == ["episode_000000", "episode_000001", "episode_000002"]
        for number, (_, read) in enumerate(jobs):
            episode, length = read(), LENGTHS[number]
            times = np.arange(length)
            wanted = np.stack([times / 10, np.full(length, -number), np.ones(length)], axis=1)
            np.testing.assert_array_equal(episode.actions, wanted.astype(np.float32))
            np.testing.assert_array_equal(episode.rewards, times)  # time + 1 follows the action taken at time
            assert episode.terminations is not None
            assert episode.terminations.tolist() == [False] * (length - 1) + [True]
            assert (episode.fps, episode.camera, episode.source) == (10.0, key, "lerobot")
            assert episode.metadata["tasks"] == [f"push the square {number % 2}"]
            assert episode.metadata["robot"] == "made_up"
            assert episode.metadata["observation.state"] == [[float(t), float(number)] for t in times]
            error = episode.video.astype(float) - drawn(number, camera)
            if kind == "image":
                assert not error.any()
            else:  # AV1 as lerobot sets it; another frame or another camera would be far off
                assert np.sqrt((error**2).mean(axis=(1, 2, 3))).max() < 12


def test_cameras_are_episodes_of_one_recording(kind: str, run: Callable[..., int], tmp_path: Path) -> None:
    words = ["--camera", "all", "--holdout-every", "3", "--workers", "2"]
    assert run("pack", FIXTURES / kind, "--out", tmp_path / "out", *words) == 0
    train, heldout = ShardSet(tmp_path / "out" / "train"), ShardSet(tmp_path / "out" / "heldout")
    assert (len(train), len(heldout)) == (4, 2)
    assert train.manifest["extra"]["conversion"]["format"] == "lerobot"
    for shards in (train, heldout):
        assert not verify_set(shards.folder)
        assert {shards.camera(index) for index in range(len(shards))} == {TOP, WRIST}
    first, second = (train.episode(index) for index in range(2))
    assert first is not None and second is not None
    assert first.metadata["recording"] == second.metadata["recording"]


def test_one_camera_must_be_named() -> None:
    with pytest.raises(ValueError, match=f"has the cameras {TOP}, {WRIST}: name one with --camera, or all"):
        lerobot_jobs(FIXTURES / "video")
    with pytest.raises(ValueError, match=f"no camera 'side'; there are {TOP}, {WRIST}"):
        lerobot_jobs(FIXTURES / "video", LerobotOptions(camera="side"))
    with pytest.raises(ValueError, match="no feature 'joints'; there are .*observation.state"):
        lerobot_jobs(FIXTURES / "video", LerobotOptions(camera=TOP, actions_key="joints"))
    jobs = lerobot_jobs(FIXTURES / "image", LerobotOptions(TOP, "observation.state", fps=5.0))
    episode = jobs[0][1]()
    assert (episode.action_dim, episode.fps) == (2, 5.0)
    assert "action" in episode.metadata


def test_older_versions_and_strangers_are_refused(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("video")
    change_info(folder, codebase_version="v2.1")
    with pytest.raises(ValueError, match="version v2.1, v3 can be read: convert it with"):
        read_info(folder)
    (folder / "meta/info.json").write_text("[]")
    with pytest.raises(ValueError, match="info.json"):
        read_info(folder)
    with pytest.raises(ValueError, match="is no LeRobotDataset"):
        read_info(tmp_path)


@pytest.mark.parametrize(
    "template", ["../../{chunk_index:03d}.parquet", "/etc/{file_index}", "data/{chunk_index.__class__}"]
)
def test_no_file_outside_is_read(copied: Callable[[str], Path], template: str) -> None:
    folder = copied("image")
    change_info(folder, data_path=template)
    for _, read in lerobot_jobs(folder, LerobotOptions(camera=TOP)):
        with pytest.raises(ValueError, match=r"lies outside of the data set|__class__"):
            read()


def test_damaged_files_cost_their_episodes(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copied("video")
    video = next((folder / "videos" / TOP).rglob("*.mp4"))
    data = video.read_bytes()
    video.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="all 3 episodes .* bad.*mp4"), pytest.warns(UserWarning, match="skipped"):
        pack(folder, tmp_path / "a", LerobotOptions(camera=TOP), format="lerobot", policy="skip")
    with pytest.warns(UserWarning, match="skipped") as caught:
        report = pack(
            folder, tmp_path / "b", LerobotOptions(), format="lerobot", policy="skip", cameras=["all"], max_bad=0.5
        )
    assert report.episodes == 3 and len([one for one in caught if "skipped" in str(one.message)]) == 3
    table = next((folder / "data").rglob("*.parquet"))
    table.write_bytes(table.read_bytes()[:-100])
    (_, read), *_ = lerobot_jobs(folder, LerobotOptions(camera=WRIST))
    with pytest.raises(ValueError, match="file-000.parquet"):
        read()
    table.unlink()
    with pytest.raises(ValueError, match="file-000.parquet"):
        read()
    table = next((folder / "meta/episodes").rglob("*.parquet"))
    table.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="no whole parquet file"):
        lerobot_jobs(folder, LerobotOptions(camera=WRIST))


def test_tables_that_disagree(copied: Callable[[str], Path]) -> None:
    from pyarrow import parquet

    folder = copied("image")
    path = next((folder / "data").rglob("*.parquet"))
    parquet.write_table(parquet.read_table(path).slice(0, 12), path)
    reads = [read for _, read in lerobot_jobs(folder, LerobotOptions(camera=TOP))]
    assert len(reads[0]()) == 6
    with pytest.raises(ValueError, match="has 6 frames of episode 1, 9 are wanted"):
        reads[1]()
