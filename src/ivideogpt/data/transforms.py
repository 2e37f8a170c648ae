"""Resizing and augmentation of clips: the same draw for every frame, deterministic given a seed.

Clips are float32 (T, C, H, W) in [0, 1] with C = 3 unless a function says otherwise; all work on any device. The same
draw gives what torchvision's functions give, but nothing is done that a clip does not need: see `_recolour`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as every image library weighs grey; torchvision rounds the first
_CACHED = 400_000  # numbers of a piece that nearly stays in a core's second cache, with what is computed from it


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Ranges of the training augmentation; the defaults are those of the published recipes.

    Args:
        scale: Area of the crop as a fraction of the largest centred square's.
        ratio: Width over height of the crop (drawn log-uniformly).
        brightness: Factor on the pixels.
        contrast: Factor on the distance to each frame's mean grey.
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
    # A wide crop of nearly the whole area does not fit: draw again, else take the middle, as torchvision does.
    middle = min(height, round(width / config.ratio[0])), min(width, round(height * config.ratio[1]))
    crop = ((height - middle[0]) // 2, (width - middle[1]) // 2, *middle)
    for _ in range(10):
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


def apply_draws(video: Tensor, draws: Sequence[Draw], resolution: int) -> Tensor:
    """Crops, resizes and recolours clips, each by its draw: (B, T, 3, H, W) -> float (B, T, 3, resolution, resolution).

    Bytes are resized as bytes, as torchvision does with such images (rounded on a GPU too), floats as floats; colours
    are always floats. On a CPU a few frames after the others go through its cache, elsewhere all clips go at once.
    """
    channels = video.shape[2]
    out = torch.empty((*video.shape[:3], resolution, resolution), dtype=torch.float32, device=video.device)
    peak = 1.0 if video.is_floating_point() else 255.0
    at_once = max(_CACHED // (channels * resolution**2), 1)
    for clip, draw, target in zip(video, draws, out, strict=True):
        top, left, height, width = draw.crop
        cut = clip[..., top : top + height, left : left + width]
        if video.device.type != "cpu":
            target.copy_(_resize(cut, resolution))
            continue
        for frames, piece in zip(cut.split(at_once), target.split(at_once), strict=True):
            _recolour(piece.copy_(_resize(frames, resolution))[None], [draw.steps], peak)
    if video.device.type != "cpu":
        _recolour(out, [draw.steps for draw in draws], peak)
    return out


def apply_draw(video: Tensor, draw: Draw, resolution: int) -> Tensor:
    """`apply_draws` of one clip (T, 3, H, W)."""
    return apply_draws(video[None], [draw], resolution)[0]


Seed: TypeAlias = "int | tuple[int, ...]"


def augment(
    video: Tensor, config: Augmentation, seeds: Sequence[Seed], resolution: int, cropped: Sequence[bool] | None = None
) -> Tensor:
    """Augments clips (B, T, 3, H, W), each by its seed alone, whatever the batch; float32 in [0, 1].

    Those that `random_crop` has `cropped` already get their colours.
    """
    height, width = video.shape[-2:]
    draws = [draw_augmentation(config, height, width, np.random.default_rng(seed)) for seed in seeds]
    if cropped is not None:
        whole = (0, 0, height, width)
        draws = [Draw(whole, d.steps) if done else d for d, done in zip(draws, cropped, strict=True)]
    return apply_draws(video, draws, resolution)


def random_crop(video: Tensor, config: Augmentation, seed: Seed, resolution: int) -> Tensor:
    """The crop that a seed draws out of a clip (T, 3, H, W), resized; bytes stay bytes."""
    height, width = video.shape[-2:]
    top, left, height, width = draw_augmentation(config, height, width, np.random.default_rng(seed)).crop
    return _resize(video[..., top : top + height, left : left + width], resolution)


def resize(video: Tensor, resolution: int) -> Tensor:
    """Resizes (T, C, H, W) float to a square with bilinear interpolation and antialiasing."""
    return _resize(video, resolution).clamp(0, 1)


def _resize(video: Tensor, resolution: int) -> Tensor:
    """`resize` of floats of any range, or of bytes."""
    if video.shape[-2:] == (resolution, resolution):
        return video
    size = (resolution, resolution)
    if video.dtype == torch.uint8 and video.device.type != "cpu":  # torch resizes bytes on a CPU only
        return F.interpolate(video.float(), size, mode="bilinear", align_corners=False, antialias=True).round()
    return F.interpolate(video, size, mode="bilinear", align_corners=False, antialias=True)


def center_crop(video: Tensor) -> Tensor:
    """The largest centred square of (..., H, W)."""
    height, width = video.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return video[..., top : top + side, left : left + side]


def fit_uint8(video: Tensor, resolution: int) -> Tensor:
    """Centre-crops and resizes a uint8 clip (T, C, H, W) to `resolution`, staying uint8; a no-op at the right size."""
    return _resize(center_crop(video), resolution)


def to_float(video: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [0, 1], contiguous in the order of its dimensions."""
    return video.to(torch.float32, memory_format=torch.contiguous_format, copy=True).div_(255)


def to_uint8(video: Tensor) -> Tensor:
    """Float [0, 1] -> uint8, rounded."""
    return (video * 255).round().clamp(0, 255).to(torch.uint8)


def _recolour(video: Tensor, steps: Sequence[Sequence[tuple[str, float]]], peak: float) -> None:
    """Applies each clip's steps in place to (B, T, 3, H, W) in [0, peak], which leaves it in [0, 1].

    Brightness, contrast and saturation each mix a pixel with black, the grey of its frame's mean and its own grey.
    So do several in a row: they are one pass `own * pixel + grey * grey(pixel) + mean * mean(grey of the frame)`. It is
    made at a hue, and behind a factor above 1: only such a one can leave the range, and is clamped at once.
    """
    nothing = [_NOTHING] * len(steps)
    mixes: list[_Mix] = [(1 / peak, 0.0, 0.0)] * len(steps)
    for turn in zip(*steps, strict=True):
        hues = [value if name == "hue" else 0.0 for name, value in turn]
        if any(hues):
            if any(mix[1:] != (0, 0) for mix in mixes):  # a mere factor may as well come after the hue
                _mix(video, mixes)
                mixes = nothing
            _turn_hues(video, hues)
        mixes = [_mix_with(mix, *step) for mix, step in zip(mixes, turn, strict=True)]
        if any(name != "hue" and value > 1 for name, value in turn):
            _mix(video, mixes)
            mixes = nothing
    if mixes != nothing:
        _mix(video, mixes)


_Mix = tuple[float, float, float]  # factors of the pixel, of its grey and of its frame's mean grey
_NOTHING: _Mix = 1.0, 0.0, 0.0


def _mix_with(mix: _Mix, name: str, value: float) -> _Mix:
    """The mix that has the effect of `mix` and then of a step."""
    own, grey, mean = mix
    if name == "brightness":
        return value * own, value * grey, value * mean
    if name == "contrast":
        return value * own, value * grey, mean + (1 - value) * (own + grey)
    if name == "saturation":
        return value * own, grey + (1 - value) * own, mean
    return mix  # a hue


def _mix(video: Tensor, mixes: Sequence[_Mix]) -> None:
    """Applies a mix for each clip in place, clamped to [0, 1]."""
    factors = torch.tensor(mixes, dtype=video.dtype, device=video.device).view(-1, 3, 1, 1, 1, 1)
    own, own_grey, mean_grey = factors.unbind(1)
    shift = None
    if any(mix[1:] != (0, 0) for mix in mixes):
        red, green, blue = video.unbind(-3)
        shift = (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).unsqueeze_(-3)
        mean = shift.mean((-2, -1), keepdim=True).mul_(mean_grey)
        shift = shift.mul_(own_grey).add_(mean) if any(mix[1] for mix in mixes) else mean
    if shift is None:
        video.mul_(own)
    elif len(mixes) == 1:  # one pass, where the factor is a number
        torch.add(shift, video, alpha=mixes[0][0], out=video)
    else:
        video.mul_(own).add_(shift)
    video.clamp_(0, 1)


def _turn_hues(video: Tensor, turns: Sequence[float]) -> None:
    """Turns the hues of clips (B, T, 3, H, W) in place by fractions of the circle."""
    rounds = math.ceil(max(map(abs, turns)) * 12)  # `_turn_hue` turns by at most a twelfth
    for ahead in (True, False):
        chosen = [clip for clip, turn in enumerate(turns) if (turn > 0 if ahead else turn < 0)]
        if not chosen:
            continue
        sixths = [6 * abs(turns[clip]) / rounds for clip in chosen]
        amount = torch.tensor(sixths, dtype=video.dtype, device=video.device).view(-1, 1, 1, 1)
        part = video if len(chosen) == len(turns) else video[chosen]
        for _ in range(rounds):
            _turn_hue(part, amount, ahead)
        if part is not video:
            video[chosen] = part


def _turn_hue(video: Tensor, amount: Tensor, ahead: bool) -> None:
    """Turns the hues of (B, T, 3, H, W) by `amount` (B, 1, 1, 1) sixths of the circle, at most half of one, in place.

    Largest and smallest value stay what they are. The hue moves the third between them, until it meets one of them and
    the next channel starts to move. Red towards green is, with `step` the amount times largest - smallest,

        red - green + (smallest + step if blue is the largest, largest - step if blue is the smallest)

    kept within smallest..largest; where blue is in the middle anything between the two serves. Green and blue are the
    same in turn, and backwards green and blue change roles.
    """
    channels = video.unbind(-3) if ahead else video.unbind(-3)[::-1]
    largest = torch.maximum(torch.maximum(channels[0], channels[1]), channels[2])
    smallest = torch.minimum(torch.minimum(channels[0], channels[1]), channels[2])
    both = largest + smallest
    low, high = smallest.lerp(largest, amount), largest.lerp(smallest, amount)
    turned = [
        torch.sub(both, channels[i - 1]).clamp_(low, high).add_(channels[i]).sub_(channels[i - 2])
        for i in range(3)
    ]  # fmt: skip
    for channel, new in zip(channels, turned, strict=True):
        torch.clamp(new, smallest, largest, out=channel)
