"""Reading .npz recordings: the three kinds, plain ones, and what cannot be read safely."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ivideogpt.data.sources.npz import NpzOptions, read_npz

FRAMES = np.random.default_rng(0).integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)


def save(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def test_bair(shared: Path) -> None:
    file = shared / "data" / "bair_sample.npz"
    episode = read_npz(file)
    arrays = np.load(file, allow_pickle=False)
    assert episode.video.shape == (30, 64, 64, 3)
    np.testing.assert_array_equal(episode.video, arrays["aux1_image"])
    np.testing.assert_allclose(np.asarray(episode.actions), arrays["action"], rtol=1e-6)
    assert episode.rewards is None
    assert episode.camera == "aux1_image"
    other = read_npz(file, NpzOptions(video_key="image"))
    np.testing.assert_array_equal(other.video, arrays["image"])


def test_rt1(shared: Path) -> None:
    episode = read_npz(shared / "data" / "fractal_sample.npz")
    assert episode.video.shape == (22, 256, 320, 3)
    assert episode.actions is None
    assert episode.rewards is None


def test_metaworld_recordings(shared: Path) -> None:
    files = sorted((shared / "data" / "metaworld").rglob("*.npz"))
    assert len(files) == 20
    for file in files[::5]:
        episode, arrays = read_npz(file), np.load(file, allow_pickle=False)
        assert episode.video.shape == (101, 64, 64, 3)
        assert episode.actions is not None
        assert episode.rewards is not None
        np.testing.assert_array_equal(episode.video, arrays["observation"][:, 6:].transpose(0, 2, 3, 1))
        # row t + 1 holds the action that led there, which is the one taken at frame t
        np.testing.assert_array_equal(episode.actions[:-1], arrays["action"][1:])
        np.testing.assert_array_equal(episode.actions[-1], 0)
        np.testing.assert_array_equal(episode.rewards, arrays["reward"][:, 0])


@pytest.mark.parametrize("key", ["video", "image", "images"])
@pytest.mark.parametrize("channels_first", [False, True])
def test_plain_files(tmp_path: Path, key: str, channels_first: bool) -> None:
    frames = FRAMES.transpose(0, 3, 1, 2) if channels_first else FRAMES
    file = save(tmp_path / "x.npz", **{key: frames}, action=np.ones((6, 2)), reward=np.arange(6), fps=12.5)
    episode = read_npz(file, NpzOptions(licence="CC0-1.0", source="mine"))
    np.testing.assert_array_equal(episode.video, FRAMES)
    assert episode.action_dim == 2
    np.testing.assert_array_equal(episode.rewards, np.arange(6, dtype=np.float32))
    assert (episode.fps, episode.source, episode.licence, episode.camera) == (12.5, "mine", "CC0-1.0", key)


def test_number_types(tmp_path: Path) -> None:
    for frames in (FRAMES.astype(np.int64), FRAMES.astype(np.float32) / 255, FRAMES.astype(np.float64) / 255):
        np.testing.assert_array_equal(read_npz(save(tmp_path / "x.npz", video=frames)).video, FRAMES)


def test_one_row_fewer(tmp_path: Path) -> None:
    """Actions get a zero row at the end; rewards, received on arriving, a zero in front."""
    file = save(tmp_path / "x.npz", video=FRAMES, actions=np.ones((5, 2)), rewards=np.arange(1, 6))
    episode = read_npz(file)
    assert episode.actions is not None
    np.testing.assert_array_equal(episode.actions[:, 0], [1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(episode.rewards, np.arange(6))


def test_reward_follows_action(tmp_path: Path) -> None:
    file = save(tmp_path / "x.npz", video=FRAMES, reward=np.arange(1, 7))
    with pytest.raises(ValueError, match=r"reward starts with 1.0.*--reward-follows-action"):
        read_npz(file)
    rewards = read_npz(file, NpzOptions(reward_follows_action=True)).rewards
    np.testing.assert_array_equal(rewards, [0, 1, 2, 3, 4, 5])


@pytest.mark.parametrize("name", ["terminations", "done", "discount"])
def test_terminations(tmp_path: Path, name: str) -> None:
    values = np.array([0, 0, 0, 0, 0, 1])
    values = 1 - values if name == "discount" else values.astype(bool)
    terminations = read_npz(save(tmp_path / "x.npz", video=FRAMES, **{name: values[:, None]})).terminations
    assert terminations is not None
    assert terminations.tolist() == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"frames": FRAMES}, r"none of observation, .* among its arrays \['frames'\]; name .* --video-key"),
        ({"video": FRAMES[0]}, r"4 dimensions, got shape \(8, 10, 3\)"),
        ({"video": FRAMES[:, :3]}, r"could be \(T, 3, H, W\) as well as"),
        ({"video": FRAMES[..., :1]}, "no dimension of 3 colours"),
        ({"video": FRAMES[:0]}, "is empty"),
        ({"video": FRAMES.astype(np.float32)}, r"must lie in 0..1, got 0.0..255.0"),
        ({"video": FRAMES.astype(np.int64) - 1}, r"must lie in 0..255, got -1..254"),
        ({"video": FRAMES.astype(np.float32) * np.nan}, "got nan..nan"),
        ({"video": FRAMES.astype(str)}, "numbers are needed"),
        ({"video": FRAMES, "action": np.ones((4, 2))}, "actions has 4 rows for 6 frames"),
        ({"video": FRAMES, "action": np.full((6, 2), np.nan)}, "nan.* at frame 0"),
        ({"video": FRAMES, "reward": np.ones((6, 2))}, r"reward of shape \(6, 2\) does not fit 6 frames"),
        ({"video": FRAMES, "fps": -1}, "fps must be a positive number"),
        ({"video": FRAMES, "action": np.array([{}] * 6)}, "allow_pickle=False"),
    ],
)
def test_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    file = save(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        read_npz(file)
    assert "bad.npz" in str(caught.value)


def test_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    file = save(tmp_path / "bad.npz", video=np.array([Trap()], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_npz(file)
    assert not (tmp_path / "sprung").exists()


def test_damaged_files(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, video=FRAMES)
    whole = buffer.getvalue()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    single = io.BytesIO()
    np.save(single, FRAMES)
    damaged = {"empty": b"", "text": b"hello", "cut": whole[:-50], "flipped": bytes(flipped), "npy": single.getvalue()}
    for name, data in damaged.items():
        file = tmp_path / f"{name}.npz"
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}.npz"):
            read_npz(file)
    with pytest.raises(ValueError, match="there is no file"):
        read_npz(tmp_path / "none.npz")
