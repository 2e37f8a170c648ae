"""Drawing: what stands where in strips and animations, and files that can be read back."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ivideogpt.drawing import (
    CAPTION_HEIGHT,
    CAPTION_WIDTH,
    GAP,
    comparison,
    contact_sheet,
    gif_bytes,
    mp4_bytes,
    png_bytes,
    save_comparison,
    save_png,
    save_video,
    strip,
    to_uint8,
)


def video(frames: int = 4, size: int = 16, seed: int = 0, clips: int | None = None) -> np.ndarray:
    """Random flat-coloured frames (T, H, W, 3), or (B, T, H, W, 3)."""
    shape = (frames, 1, 1, 3) if clips is None else (clips, frames, 1, 1, 3)
    colours = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return colours.repeat(size, axis=-3).repeat(size, axis=-2)


def test_to_uint8() -> None:
    frames = video()
    assert to_uint8(frames) is frames
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)
    assert np.array_equal(to_uint8(tensor), frames)
    assert np.array_equal(to_uint8(tensor.float() / 255), frames)
    assert to_uint8(torch.tensor([[[-1.0, 2.0, 0.5]]])).tolist() == [[[0] * 3, [255] * 3, [128] * 3]]  # grey to colour


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((2, 8, 8, 3)), np.zeros((8, 8), np.uint8), np.zeros((2, 3, 8, 8), np.uint8), torch.zeros(2, 8, 8, 3)],
)
def test_to_uint8_refuses(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        to_uint8(wrong)


def test_strip_has_a_row_for_truth_prediction_and_error() -> None:
    truth, prediction = video(seed=0), video(seed=1)
    image = strip(truth, prediction, context_length=2, scale=2)
    side = 2 * 16
    assert image.shape == (CAPTION_HEIGHT + 3 * (side + GAP) + 2 * GAP, CAPTION_WIDTH + 4 * (side + GAP), 3)
    error = np.abs(truth.astype(int) - prediction.astype(int))
    for row, expected in enumerate([truth, prediction, error]):
        for time in range(4):
            top, left = CAPTION_HEIGHT + row * (side + GAP), CAPTION_WIDTH + time * (side + GAP)
            assert (image[top : top + side, left : left + side] == expected[time, 0, 0]).all()


def test_several_clips_stand_below_each_other() -> None:
    truth, prediction = video(clips=3, seed=0), video(clips=3, seed=1)
    assert strip(truth, prediction, scale=1).shape[0] - CAPTION_HEIGHT == 3 * (3 * (16 + GAP) + 2 * GAP)
    frames = comparison(truth, prediction, scale=1)
    assert frames.shape == (4, CAPTION_HEIGHT + 3 * (16 + GAP) - GAP, 3 * (16 + GAP) - GAP, 3)
    top = CAPTION_HEIGHT + 16 + GAP
    assert (frames[2, top : top + 16, 16 + GAP : 32 + GAP] == prediction[1, 2, 0, 0]).all()


def test_small_frames_are_enlarged_by_default() -> None:
    assert comparison(video(), video()).shape[1] == CAPTION_HEIGHT + 128
    assert strip(video(size=256), video(size=256)).shape[0] == CAPTION_HEIGHT + 3 * (256 + GAP) + 2 * GAP


def test_truth_and_prediction_must_match() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        strip(video(4), video(5))


def test_contact_sheet_takes_videos_of_any_length() -> None:
    image = contact_sheet([video(4), video(2, size=8)], ["first", "second"])
    assert image.shape == (2 * CAPTION_HEIGHT + 16 + 8 + 2 * GAP, 4 * (16 + GAP), 3)
    assert (image[CAPTION_HEIGHT : CAPTION_HEIGHT + 16, :16] == video(4)[0, 0, 0]).all()
    with pytest.raises(ValueError, match="a caption for each or none"):
        contact_sheet([video(4)], ["first", "second"])


def test_png_is_lossless() -> None:
    image = strip(video(), video(seed=1))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(image)))), image)


@pytest.mark.parametrize("fps", [2.0, 10.0])
def test_gif_has_every_frame_and_loops(fps: float) -> None:
    frames = video(6)
    with Image.open(io.BytesIO(gif_bytes(frames, fps))) as image:
        assert image.n_frames == 6
        assert image.info["loop"] == 0
        assert image.info["duration"] == 1000 / fps
        for time in range(6):
            image.seek(time)
            shown = np.asarray(image.convert("RGB")).astype(int)
            assert np.abs(shown - frames[time]).max() <= 8  # palette of 256 colours
    with pytest.raises(ValueError, match="fps must be positive"):
        gif_bytes(frames, 0.0)


def test_mp4_keeps_the_colours_of_single_pixels() -> None:
    av = pytest.importorskip("av")
    noise = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    with av.open(io.BytesIO(mp4_bytes(noise, fps=5))) as container:
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert float(container.streams.video[0].average_rate) == 5.0
    assert shown.shape == (5, 32, 32, 3)
    assert np.abs(shown[:, ::2, ::2].astype(int) - noise).mean() < 12


def test_without_pyav_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"ivideogpt\[video\]"):
        save_video(tmp_path / "a.mp4", video())
    assert not os.listdir(tmp_path)


def test_files_by_their_ending(tmp_path: Path) -> None:
    truth, prediction = video(seed=0), video(seed=1)
    for name in ("a.gif", "A.PNG"):
        save_video(tmp_path / name, truth)
        save_comparison(tmp_path / f"c-{name}", truth, prediction, context_length=1)
    with Image.open(tmp_path / "c-a.gif") as image:
        assert image.n_frames == 4
    assert np.array_equal(np.asarray(Image.open(tmp_path / "c-A.PNG")), strip(truth, prediction, 1))
    with pytest.raises(ValueError, match=r"\.webm.*choose \.gif, \.mp4 or \.png"):
        save_comparison(tmp_path / "a.webm", truth, prediction)
    assert len(os.listdir(tmp_path)) == 4


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save_png(path, video()[0])
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_png(path, video(seed=1)[0])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]
