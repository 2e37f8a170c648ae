"""Shard sets as LeRobotDatasets: lossless there and back, several cameras, and opened by lerobot itself."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ivideogpt.data.packing import pack
from ivideogpt.data.reader import ShardSet
from ivideogpt.data.shards import ShardSetWriter
from ivideogpt.data.sources.lerobot import LerobotOptions

FIXTURES = Path(__file__).parent / "fixtures" / "lerobot"
OPEN = """
import json, sys
from lerobot.datasets.lerobot_dataset import LeRobotDataset
data = LeRobotDataset("test/exported", root=sys.argv[1], video_backend="pyav")
rows = [data[index] for index in range(len(data))]
print(json.dumps({
    "episodes": data.num_episodes, "fps": data.fps, "cameras": data.meta.camera_keys,
    "tasks": [row["task"] for row in rows], "timestamps": [float(row["timestamp"]) for row in rows],
    "actions": [row["action"].tolist() for row in rows], "rewards": [float(row["next.reward"]) for row in rows],
    "frames": [[(255 * row[key]).round().byte().permute(1, 2, 0).tolist() for key in data.meta.camera_keys]
               for row in rows],
}))
"""


@pytest.mark.parametrize("kind", ["image", "video"])
def test_there_and_back(kind: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(FIXTURES / "image", tmp_path / "set", LerobotOptions(), format="lerobot", cameras=["all"])
    words = ["--video"] if kind == "video" else []
    assert run("export", tmp_path / "set", "--out", tmp_path / "out", *words) == 0
    said = capsys.readouterr().out
    assert "3 episodes, 19 frames of observation.images.top, observation.images.wrist" in said
    assert (" dB" in said) == (kind == "video")
    pack(tmp_path / "out", tmp_path / "again", LerobotOptions(), format="lerobot", cameras=["all"])
    first, second = ShardSet(tmp_path / "set"), ShardSet(tmp_path / "again")
    assert len(first) == len(second) == 6
    for number in range(6):
        one, other = first.episode(number), second.episode(number)
        assert one is not None and other is not None
        assert first.key(number) == second.key(number) and one.camera == other.camera and one.fps == other.fps
        for field in ("actions", "rewards", "terminations"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        assert one.metadata["tasks"] == other.metadata["tasks"]
        error = one.video.astype(float) - other.video
        assert np.abs(error).max() == 0 if kind == "image" else np.sqrt((error**2).mean()) < 8


def test_what_cannot_be_one_data_set(make_episode, run: Callable[..., int], tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path / "set") as writer:
        writer.write("a", make_episode(5, action_dim=2))
        writer.write("b", make_episode(5, action_dim=3))
    with pytest.raises(ValueError, match=r"episode 1 .*actions 3\) differs from the first"):
        run("export", tmp_path / "set", "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out is there already"):
        run("export", tmp_path / "set", "--out", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["--video"]])
def test_lerobot_opens_it(words: list[str], run: Callable[..., int], tmp_path: Path) -> None:
    """Needs an environment with `pip install lerobot==0.4.4 accelerate 'numpy<2.3'`: it cannot share this one."""
    python = os.environ.get("IVIDEOGPT_LEROBOT_PYTHON")
    if python is None:
        pytest.skip("set IVIDEOGPT_LEROBOT_PYTHON to the python of an environment with lerobot")
    pack(FIXTURES / "image", tmp_path / "set", LerobotOptions(), format="lerobot", cameras=["all"])
    assert run("export", tmp_path / "set", "--out", tmp_path / "out", *words) == 0
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", OPEN, str(tmp_path / "out")], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    shards = ShardSet(tmp_path / "set")
    cameras = [[shards.episode(number) for number in range(start, 6, 2)] for start in (0, 1)]
    top = [episode for episode in cameras[0] if episode is not None]
    assert (found["episodes"], found["fps"]) == (3, 10)
    assert found["cameras"] == ["observation.images.top", "observation.images.wrist"]
    np.testing.assert_allclose(found["actions"], np.concatenate([episode.actions for episode in top]))
    rewards = [np.append(episode.rewards[1:], 0) for episode in top]  # type: ignore[index]
    np.testing.assert_allclose(found["rewards"], np.concatenate(rewards))
    np.testing.assert_allclose(found["timestamps"], np.concatenate([np.arange(len(e)) / 10 for e in top]), rtol=1e-6)
    assert found["tasks"] == [task for episode in top for task in episode.metadata["tasks"] * len(episode)]
    frames = np.array(found["frames"], np.uint8)
    for index, episodes in enumerate(cameras):
        wanted = np.concatenate([episode.video for episode in episodes if episode is not None])
        error = frames[:, index].astype(float) - wanted
        assert np.abs(error).max() == 0 if not words else np.sqrt((error**2).mean()) < 8
