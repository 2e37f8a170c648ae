"""Resizing and augmentation: one draw a clip, deterministic, and the same colours as torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from ivideogpt.data.transforms import (
    Augmentation,
    Draw,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    apply_draw,
    augment,
    center_crop,
    draw_augmentation,
    fit_uint8,
    resize,
)


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def test_deterministic_and_in_range(clip: torch.Tensor) -> None:
    first, again, other = (augment(clip, Augmentation(), seed, 16) for seed in ((1, 2), (1, 2), (1, 3)))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert first.shape == (5, 3, 16, 16)
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1


def test_every_frame_gets_the_same_draw(clip: torch.Tensor) -> None:
    still = clip[:1].expand(5, -1, -1, -1)
    out = augment(still, Augmentation(), 3, 24)
    assert torch.equal(out, out[:1].expand_as(out))


def test_draws_keep_to_the_published_ranges() -> None:
    config, rng = Augmentation(), np.random.default_rng(0)
    draws = [draw_augmentation(config, 256, 320, rng) for _ in range(500)]
    crops = np.array([draw.crop for draw in draws])
    area = crops[:, 2] * crops[:, 3] / 256**2
    ratio = crops[:, 3] / crops[:, 2]
    assert 0.79 < area.min() < 0.81
    assert 0.98 < area.max() <= 1.01
    assert 0.89 < ratio.min() < 0.92
    assert 1.08 < ratio.max() < 1.11
    assert (crops[:, :2] >= 0).all()
    assert (crops[:, 0] + crops[:, 2] <= 256).all()
    assert (crops[:, 1] + crops[:, 3] <= 320).all()
    assert len({tuple(name for name, _ in draw.steps) for draw in draws}) == 24  # every order of four
    values = {name: [dict(draw.steps)[name] for draw in draws] for name in ("brightness", "hue")}
    assert (min(values["brightness"]) >= 0.9) and (max(values["brightness"]) <= 1.1)
    assert (min(values["hue"]) >= -0.05) and (max(values["hue"]) <= 0.05)


@pytest.mark.parametrize("factor", [0.7, 1.0, 1.4])
def test_colours_are_torchvisions(clip: torch.Tensor, factor: float) -> None:
    torch.testing.assert_close(adjust_brightness(clip, factor), reference.adjust_brightness(clip, factor))
    expected = reference.adjust_saturation(clip, factor)
    torch.testing.assert_close(adjust_saturation(clip, factor), expected, atol=2e-4, rtol=0)
    # torchvision takes each frame's mean, we the clip's: equal for one frame
    expected = reference.adjust_contrast(clip[:1], factor)
    torch.testing.assert_close(adjust_contrast(clip[:1], factor), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("turn", [-0.5, -0.05, 0.0, 0.05, 0.3])
def test_hue_is_torchvisions(clip: torch.Tensor, turn: float) -> None:
    clip[0, :, 0, :4] = torch.tensor([[0.0, 1.0, 0.5, 0.2]] * 3)  # greys have no hue
    torch.testing.assert_close(adjust_hue(clip, turn), reference.adjust_hue(clip, turn), atol=1e-5, rtol=0)


def test_crop_is_a_resized_cut(clip: torch.Tensor) -> None:
    out = apply_draw(clip, Draw((2, 3, 20, 18), ()), 16)
    expected = reference.resized_crop(clip, 2, 3, 20, 18, [16, 16], antialias=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_fit_uint8() -> None:
    video = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    assert torch.equal(center_crop(video), video[..., 5:25])
    assert torch.equal(fit_uint8(video[..., :20], 20), video[..., :20])
    small = fit_uint8(video, 10)
    assert small.dtype == torch.uint8
    assert small.shape == (2, 3, 10, 10)
    expected = resize(center_crop(video).float() / 255, 10)
    assert (small.float() / 255 - expected).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("fields", [{"scale": (0.0, 1.0)}, {"scale": (0.5, 1.2)}, {"ratio": (2.0, 1.0)}, {"hue": 0.6}])
def test_refused(fields: dict) -> None:
    with pytest.raises(ValueError):
        Augmentation(**fields)
