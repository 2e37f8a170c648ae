"""Resizing and augmentation of clips: the same draw for every frame, deterministic given a seed.

Clips are float32 (T, C, H, W) in [0, 1] with C = 3 unless a function says otherwise; all work on any device.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as every image library weighs grey


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Ranges of the training augmentation; the defaults are those of the published recipes.

    Args:
        scale: Area of the crop as a fraction of the largest centred square's.
        ratio: Width over height of the crop (drawn log-uniformly).
        brightness: Factor on the pixels.
        contrast: Factor on the distance to the clip's mean grey.
        saturation: Factor on the distance to each pixel's grey.
        hue: Largest turn of the hue either way, in turns.
    """

    scale: tuple[float, float] = (0.8, 1.0)
    ratio: tuple[float, float] = (0.9, 1.1)
    brightness: tuple[float, float] = (0.9, 1.1)
    contrast: tuple[float, float] = (0.9, 1.1)
    saturation: tuple[float, float] = (0.9, 1.1)
    hue: float = 0.05

    def __post_init__(self) -> None:
        for name in ("scale", "ratio", "brightness", "contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be 0 < low <= high, got {(low, high)}")
        if self.scale[1] > 1 or not 0 <= self.hue <= 0.5:
            raise ValueError(f"scale may not exceed 1 nor hue leave 0..0.5, got {self.scale} and {self.hue}")


@dataclasses.dataclass(frozen=True)
class Draw:
    """What was drawn for one clip: crop (top, left, height, width) in pixels, factors and their order."""

    crop: tuple[int, int, int, int]
    steps: tuple[tuple[str, float], ...]


def draw_augmentation(config: Augmentation, height: int, width: int, rng: np.random.Generator) -> Draw:
    """Draws crop and colours for one clip of `height` x `width` pixels."""
    side = min(height, width)
    crop = ((height - side) // 2, (width - side) // 2, side, side)
    for _ in range(10):  # a wide crop of nearly the whole area does not fit: draw again, else take the square
        area = side * side * rng.uniform(*config.scale)
        ratio = math.exp(rng.uniform(math.log(config.ratio[0]), math.log(config.ratio[1])))
        crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
            crop = (int(top), int(left), crop_height, crop_width)
            break
    steps = [
        ("brightness", float(rng.uniform(*config.brightness))),
        ("contrast", float(rng.uniform(*config.contrast))),
        ("saturation", float(rng.uniform(*config.saturation))),
        ("hue", float(rng.uniform(-config.hue, config.hue))),
    ]
    return Draw(crop, tuple(steps[i] for i in rng.permutation(len(steps))))


def apply_draw(video: Tensor, draw: Draw, resolution: int) -> Tensor:
    """Crops, resizes to `resolution` and recolours a clip (T, 3, H, W) -> (T, 3, resolution, resolution)."""
    top, left, height, width = draw.crop
    video = resize(video[..., top : top + height, left : left + width], resolution)
    for name, value in draw.steps:
        video = _COLOURS[name](video, value)
    return video


def augment(video: Tensor, config: Augmentation, seed: int | tuple[int, ...], resolution: int) -> Tensor:
    """Augments one clip (T, 3, H, W); the same seed gives the same result."""
    rng = np.random.default_rng(seed)
    return apply_draw(video, draw_augmentation(config, video.shape[-2], video.shape[-1], rng), resolution)


def resize(video: Tensor, resolution: int) -> Tensor:
    """Resizes (T, C, H, W) float to a square with bilinear interpolation and antialiasing."""
    if video.shape[-2:] == (resolution, resolution):
        return video
    size = (resolution, resolution)
    return F.interpolate(video, size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


def center_crop(video: Tensor) -> Tensor:
    """The largest centred square of (..., H, W)."""
    height, width = video.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return video[..., top : top + side, left : left + side]


def fit_uint8(video: Tensor, resolution: int) -> Tensor:
    """Centre-crops and resizes a uint8 clip (T, C, H, W) to `resolution`, staying uint8; a no-op at the right size."""
    video = center_crop(video)
    if video.shape[-1] == resolution:
        return video
    return to_uint8(resize(to_float(video), resolution))


def to_float(video: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [0, 1]."""
    return video.to(torch.float32) / 255


def to_uint8(video: Tensor) -> Tensor:
    """Float [0, 1] -> uint8, rounded."""
    return (video * 255).round().clamp(0, 255).to(torch.uint8)


def adjust_brightness(video: Tensor, factor: float) -> Tensor:
    """Scales the pixels."""
    return (video * factor).clamp(0, 1)


def adjust_contrast(video: Tensor, factor: float) -> Tensor:
    """Scales the distance to the mean grey of the whole clip, so that every frame is mapped alike."""
    return torch.lerp(_grey(video).mean(), video, factor).clamp(0, 1)


def adjust_saturation(video: Tensor, factor: float) -> Tensor:
    """Scales the distance of each pixel to its grey."""
    return torch.lerp(_grey(video).expand_as(video), video, factor).clamp(0, 1)


def adjust_hue(video: Tensor, turn: float) -> Tensor:
    """Turns the hue by a fraction of the circle (through HSV)."""
    red, green, blue = video.unbind(-3)
    value, smallest = video.amax(-3), video.amin(-3)
    chroma = value - smallest
    safe = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = hue + 6 * turn
    channels = []
    for offset in (5, 3, 1):  # closed form of HSV -> RGB, without six cases
        sector = torch.remainder(offset + hue, 6)
        channels.append(value - chroma * torch.minimum(sector, 4 - sector).clamp(0, 1))
    return torch.stack(channels, -3)


def _grey(video: Tensor) -> Tensor:
    """Luminance (T, 1, H, W)."""
    weights = video.new_tensor(_LUMA).view(3, 1, 1)
    return (video * weights).sum(-3, keepdim=True)


_COLOURS = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}
