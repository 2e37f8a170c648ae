"""Resizing and augmentation: one draw a clip, deterministic, and what torchvision makes of the same draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as pil
from torchvision.transforms.v2 import functional as reference

from ivideogpt.data.transforms import (
    Augmentation,
    Draw,
    apply_draw,
    apply_draws,
    augment,
    center_crop,
    draw_augmentation,
    fit_uint8,
    resize,
    to_float,
)

LEVEL = 1 / 255
WIDE = Augmentation((0.3, 1.0), (0.7, 1.4), (0.3, 1.9), (0.3, 1.9), (0.1, 2.5), 0.5)


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.rand(5, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def random_bytes(seed: int, frames: int = 3, height: int = 40, width: int = 44) -> torch.Tensor:
    """A clip (T, 3, H, W): noise, a smooth part, greys, black and white, all of which hue and contrast treat apart."""
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, width)[None, None, :, None] * rng.uniform(0.2, 1, (frames, 1, 1, 3))
    video[:, : height // 2] = ramp.astype(np.uint8)
    video[:, :4] = rng.integers(0, 256, (frames, 4, width, 1), dtype=np.uint8)
    video[:, 4:6], video[:, 6:8] = 0, 255
    return torch.from_numpy(video).permute(0, 3, 1, 2)


def torchvisions(video: torch.Tensor, draw: Draw, resolution: int) -> torch.Tensor:
    """The same draw by torchvision: the crop of what it is given, the colours of floats."""
    video = reference.resized_crop(video, *draw.crop, size=[resolution, resolution], antialias=True)
    video = reference.to_dtype(video, torch.float32, scale=True)
    for name, value in draw.steps:
        video = getattr(reference, f"adjust_{name}")(video, value)
    return video


def originals(video: torch.Tensor, draw: Draw, resolution: int) -> torch.Tensor:
    """The same draw frame by frame through PIL, as the original does; each step rounds to bytes."""
    out = []
    for frame in video.float():
        image = pil.to_pil_image(pil.resized_crop(frame, *draw.crop, [resolution, resolution]) / 255)
        for name, value in draw.steps:
            image = getattr(pil, f"adjust_{name}")(image, value)
        out.append(pil.to_tensor(image))
    return torch.stack(out)


def test_deterministic_and_in_range(clip: torch.Tensor) -> None:
    for video in (clip[None], (clip[None] * 255).to(torch.uint8)):
        first, again, other = (augment(video, Augmentation(), [seed], 16) for seed in ((1, 2), (1, 2), (1, 3)))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)
        assert first.shape == (1, 5, 3, 16, 16)
        assert first.dtype == torch.float32
        assert first.is_contiguous()
        assert first.min() >= 0
        assert first.max() <= 1


def test_what_is_given_stays(clip: torch.Tensor) -> None:
    """Also where neither crop nor size change anything."""
    for video in (clip, (clip * 255).to(torch.uint8)):
        before = video.clone()
        apply_draw(video, Draw((0, 0, 24, 24), (("brightness", 0.5), ("hue", 0.1))), 24)
        to_float(video)
        assert torch.equal(video, before)


def test_every_frame_gets_the_same_draw(clip: torch.Tensor) -> None:
    still = clip[:1].expand(5, -1, -1, -1)
    out = augment(still[None], Augmentation(), [3], 24)[0]
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


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 68), (68, 64)])
def test_a_crop_that_never_fits_is_torchvisions_middle(height: int, width: int) -> None:
    from torchvision.transforms import RandomResizedCrop

    config = Augmentation(scale=(1.0, 1.0), ratio=(1.2, 1.3))  # the square's whole area, but wider: it never fits
    draw = draw_augmentation(config, height, width, np.random.default_rng(0))
    assert draw.crop == RandomResizedCrop.get_params(torch.zeros(3, height, width), [1.0, 1.0], [1.2, 1.3])


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("of_bytes", [True, False])
def test_each_operation_is_torchvisions(name: str, of_bytes: bool) -> None:
    rng = np.random.default_rng(1)
    values = [-0.5, -1 / 12, -0.05, 0.0, 0.05, 1 / 12, 0.5] if name == "hue" else [0.2, 0.9, 1.0, 1.1, 2.5]
    values += list(rng.uniform(-0.5, 0.5, 20) if name == "hue" else rng.uniform(0.5, 1.5, 20))
    for number, value in enumerate(values):
        video = random_bytes(number)
        video = video if of_bytes else video / 255
        draw = Draw((0, 0, 40, 44), ((name, float(value)),))
        torch.testing.assert_close(apply_draw(video, draw, 32), torchvisions(video, draw, 32), atol=0.1 * LEVEL, rtol=0)


@pytest.mark.parametrize("config", [Augmentation(), WIDE], ids=["published", "wide"])
@pytest.mark.parametrize("of_bytes", [True, False])
def test_the_whole_chain_is_torchvisions(config: Augmentation, of_bytes: bool) -> None:
    rng = np.random.default_rng(2)
    for number in range(60):
        video = random_bytes(number) if of_bytes else random_bytes(number) / 255
        draw = draw_augmentation(config, 40, 44, rng)
        torch.testing.assert_close(apply_draw(video, draw, 32), torchvisions(video, draw, 32), atol=0.1 * LEVEL, rtol=0)


def test_crop_of_bytes_is_that_of_floats() -> None:
    rng = np.random.default_rng(3)
    for number in range(40):
        video = random_bytes(number)
        draw = Draw(draw_augmentation(WIDE, 40, 44, rng).crop, ())
        torch.testing.assert_close(
            apply_draw(video, draw, 32), torchvisions(video / 255, draw, 32), atol=1.01 * LEVEL, rtol=0
        )
        exact = apply_draw(video / 255, draw, 32)
        torch.testing.assert_close(exact, torchvisions(video / 255, draw, 32), atol=1e-5, rtol=0)


def test_only_the_cutting_of_pil_differs_from_the_original() -> None:
    """PIL cuts off to whole bytes after every step: some two of 255 levels darker, as against torchvision's floats."""
    rng = np.random.default_rng(4)
    for number in range(20):
        video, draw = random_bytes(number), draw_augmentation(Augmentation(), 40, 44, rng)
        original = originals(video, draw, 32)
        ours, floats = (original - made(video, draw, 32) for made in (apply_draw, torchvisions))
        assert ours.mean().item() == pytest.approx(floats.mean().item(), abs=0.02 * LEVEL)
        assert -3 * LEVEL < ours.mean() < 0
        assert ours.abs().mean() < 3 * LEVEL


def test_a_clip_is_the_same_in_any_batch() -> None:
    """Whether the batch goes through clip by clip, as on a CPU, or all at once, as on a GPU."""
    from ivideogpt.data import transforms

    rng = np.random.default_rng(5)
    videos = torch.stack([random_bytes(number, frames=7) for number in range(12)])
    draws = [draw_augmentation(WIDE, 40, 44, rng) for _ in videos]
    out = apply_draws(videos, draws, 24)
    for video, draw, result in zip(videos, draws, out, strict=True):
        assert torch.equal(apply_draw(video, draw, 24), result)
        parts = torch.cat([apply_draw(video[:3], draw, 24), apply_draw(video[3:], draw, 24)])
        assert torch.equal(parts, result)
    together = torch.stack([apply_draw(v / 255, Draw(d.crop, ()), 24) for v, d in zip(videos, draws, strict=True)])
    transforms._recolour(together, [draw.steps for draw in draws], 1.0)
    alone = torch.stack([apply_draw(v / 255, d, 24) for v, d in zip(videos, draws, strict=True)])
    torch.testing.assert_close(together, alone, atol=0.1 * LEVEL, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same() -> None:
    rng = np.random.default_rng(6)
    videos = torch.stack([random_bytes(number) for number in range(8)])
    draws = [draw_augmentation(Augmentation(), 40, 44, rng) for _ in videos]
    for video, tolerance in ((videos / 255, 0.1 * LEVEL), (videos, 4 * LEVEL)):  # bytes may round to the other side
        result = apply_draws(video.cuda(), draws, 32).cpu()
        torch.testing.assert_close(result, apply_draws(video, draws, 32), atol=tolerance, rtol=0)


def test_published_ranges_of_the_hue_take_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    from ivideogpt.data import transforms

    assert math.ceil(Augmentation().hue * 12) == 1
    rounds: list[float] = []
    plain = transforms._turn_hue

    def counted(video: torch.Tensor, amount: torch.Tensor, ahead: bool) -> None:
        rounds.append(amount.item())
        plain(video, amount, ahead)

    monkeypatch.setattr(transforms, "_turn_hue", counted)
    apply_draw(random_bytes(0), Draw((0, 0, 40, 44), (("hue", 0.05),)), 32)
    assert rounds == [pytest.approx(0.3)]
    apply_draw(random_bytes(0), Draw((0, 0, 40, 44), (("hue", 0.0),)), 32)
    assert len(rounds) == 1  # no turn, no work


def test_fit_uint8() -> None:
    video = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    assert torch.equal(center_crop(video), video[..., 5:25])
    assert torch.equal(fit_uint8(video[..., :20], 20), video[..., :20])
    small = fit_uint8(video, 10)
    assert small.dtype == torch.uint8
    assert small.shape == (2, 3, 10, 10)
    expected = resize(center_crop(video).float() / 255, 10)
    assert (small.float() / 255 - expected).abs().max() <= LEVEL + 1e-6


@pytest.mark.parametrize("fields", [{"scale": (0.0, 1.0)}, {"scale": (0.5, 1.2)}, {"ratio": (2.0, 1.0)}, {"hue": 0.6}])
def test_refused(fields: dict) -> None:
    with pytest.raises(ValueError):
        Augmentation(**fields)
