"""What stands between the convolutions of a decoder, in Triton: group norm and SiLU, biases and residuals.

Maps are channels-last. A norm is one kernel with a program a group, or two of larger maps: sums of parts of a map, then
all the rest. A convolution leaves its bias to what follows it, which has the map in hand anyway.

B maps of C channels and H W = P pixels, stored pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import proxy

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ivideogpt.models.autoencoder import Recomputing, ResidualBlock, normed_convolution
from ivideogpt.rollout.gpu.launch import power_of_two

TILE = 8192
"""Values that a program reads."""

GROUP_VALUES, GROUP_PROGRAMS = 2**14, 512
"""Values of a group that one program holds, and programs up to which a norm is done so: a group's channels lie apart in
memory, so that many maps move more of it than by two kernels that read whole pixels."""

MOST_PARTS = 32
"""Parts of a map whose sums each program of the second kernel reads."""


@triton.jit
def norm_groups(
    x, shift, weight, bias, out, pixels, eps,
    CHANNELS: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, BLOCK_P: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The norm of one group of GROUP channels of one map, and its SiLU; of x + ``shift`` with SHIFT."""
    image = tl.program_id(1)
    channels = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    pixel = tl.arange(0, BLOCK_P)
    seen = (pixel < pixels)[:, None] & (channels < CHANNELS)[None, :]
    at = (image.to(tl.int64) * pixels + pixel)[:, None] * CHANNELS + channels[None, :]
    values = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    if SHIFT:
        values = tl.where(seen, values + tl.load(shift + channels).to(tl.float32)[None, :], 0.0)
    count = GROUP * pixels
    mean = tl.sum(tl.sum(values, axis=1), axis=0) / count
    centred = tl.where(seen, values - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(tl.sum(centred * centred, axis=1), axis=0) / count + eps)
    scale = inverse * tl.load(weight + channels).to(tl.float32)
    values = centred * scale[None, :] + tl.load(bias + channels).to(tl.float32)[None, :]
    if SILU:
        values = values * tl.sigmoid(values)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=seen)


@triton.jit
def part_sums(
    x, shift, sums, pixels, parts, part_pixels,
    CHANNELS: tl.constexpr, SHIFT: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums and sums of squares of a part's pixels, a channel each: ``sums`` (B, parts, 2, CHANNELS).

    With SHIFT, of x + ``shift`` (CHANNELS).
    """
    part = tl.program_id(0)
    image = tl.program_id(1)
    channels = tl.arange(0, CHANNELS)
    added = tl.zeros([CHANNELS], tl.float32)
    if SHIFT:
        added = tl.load(shift + channels).to(tl.float32)
    total = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    end = tl.minimum((part + 1) * part_pixels, pixels)
    for first in range(part * part_pixels, end, BLOCK_P):
        pixel = first + tl.arange(0, BLOCK_P)
        seen = (pixel < end)[:, None]
        at = (image.to(tl.int64) * pixels + pixel)[:, None] * CHANNELS + channels[None, :]
        values = tl.load(x + at, mask=seen, other=0.0).to(tl.float32) + added[None, :]
        values = tl.where(seen, values, 0.0)
        total += tl.sum(values, axis=0)
        squares += tl.sum(values * values, axis=0)
    out = sums + (image * parts + part) * 2 * CHANNELS + channels
    tl.store(out, total)
    tl.store(out + CHANNELS, squares)


@triton.jit
def normalize(
    x, shift, sums, weight, bias, out, pixels, parts, eps,
    CHANNELS: tl.constexpr, SHIFT: tl.constexpr, GROUP: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The norm of BLOCK_P pixels, by groups of GROUP channels, and its SiLU; of x + ``shift`` with SHIFT."""
    image = tl.program_id(1)
    channels = tl.arange(0, CHANNELS)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    wanted = (pixel < pixels)[:, None]
    at = (image.to(tl.int64) * pixels + pixel)[:, None] * CHANNELS + channels[None, :]
    values = tl.load(x + at, mask=wanted, other=0.0).to(tl.float32)
    one = tl.arange(0, BLOCK_PARTS)
    seen = (one < parts)[:, None]
    of_parts = sums + (image * parts + one)[:, None] * 2 * CHANNELS + channels[None, :]
    total = tl.sum(tl.load(of_parts, mask=seen, other=0.0), axis=0)
    squares = tl.sum(tl.load(of_parts + CHANNELS, mask=seen, other=0.0), axis=0)
    count = GROUP * pixels
    group_total = tl.sum(tl.reshape(total, [CHANNELS // GROUP, GROUP]), axis=1) / count
    group_squares = tl.sum(tl.reshape(squares, [CHANNELS // GROUP, GROUP]), axis=1) / count
    inverse = tl.rsqrt(tl.maximum(group_squares - group_total * group_total, 0.0) + eps)
    spread = tl.zeros([CHANNELS // GROUP, GROUP], tl.float32)
    mean = tl.reshape(spread + group_total[:, None], [CHANNELS])
    scale = tl.reshape(spread + inverse[:, None], [CHANNELS])
    scale = scale * tl.load(weight + channels).to(tl.float32)
    if SHIFT:
        mean = mean - tl.load(shift + channels).to(tl.float32)
    offset = tl.load(bias + channels).to(tl.float32) - mean * scale
    values = values * scale[None, :] + offset[None, :]
    if SILU:
        values = values * tl.sigmoid(values)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def add(x, y, bias, out, count, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of maps x and y and of ``bias`` (CHANNELS), with ``count`` values in all."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seen = item < count
    values = tl.load(x + item, mask=seen, other=0.0).to(tl.float32)
    values += tl.load(y + item, mask=seen, other=0.0).to(tl.float32)
    values += tl.load(bias + item % CHANNELS, mask=seen, other=0.0).to(tl.float32)
    tl.store(out + item, values.to(out.dtype.element_ty), mask=seen)


def fits(norm: nn.Module) -> bool:
    """Whether the kernels know this norm: channels and groups of them that are powers of two."""
    if not isinstance(norm, nn.GroupNorm) or not norm.affine:
        return False
    channels, group = norm.num_channels, norm.num_channels // norm.num_groups
    return channels & (channels - 1) == 0 and group & (group - 1) == 0 and 16 <= channels <= TILE // 8


def group_norm(norm: nn.GroupNorm, x: Tensor, silu: bool, shift: Tensor | None = None) -> Tensor:
    """``norm(x)`` of ``x`` (B, C, H, W), and the SiLU of that; of x + ``shift`` (C) if given. Sums are float32."""
    x = x.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = x.shape
    pixels = height * width
    added = norm.bias if shift is None else shift
    out = torch.empty_like(x)
    group = channels // norm.num_groups
    if group * pixels <= GROUP_VALUES and images * norm.num_groups <= GROUP_PROGRAMS:
        norm_groups[(norm.num_groups, images)](
            x, added, norm.weight, norm.bias, out, pixels, norm.eps,
            channels, shift is not None, group, power_of_two(pixels), silu, num_warps=8,
        )  # fmt: skip
        return out
    fewest = max(1, 1024 // channels)  # small maps are spread over the device
    block = min(TILE // channels, max(fewest, power_of_two(-(-pixels // 64))))
    part = max(block, -(-pixels // MOST_PARTS))
    parts = -(-pixels // part)
    sums = torch.empty(images, parts, 2, channels, dtype=torch.float32, device=x.device)
    part_sums[(parts, images)](x, added, sums, pixels, parts, part, channels, shift is not None, block)
    normalize[(-(-pixels // block), images)](
        x, added, sums, norm.weight, norm.bias, out, pixels, parts, norm.eps,
        channels, shift is not None, group, block, power_of_two(parts), silu,
    )  # fmt: skip
    return out


def agrees(device: torch.device) -> bool:
    """Whether the kernels give what torch gives, on a small map on ``device``."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(4, 32, device=device)
    x = torch.randn(2, 32, 8, 8, generator=generator).to(device)
    with torch.no_grad():
        return torch.allclose(group_norm(norm, x, silu=True), F.silu(norm(x)), atol=1e-5)


def residual_block(block: ResidualBlock, x: Tensor) -> Tensor:
    """What :class:`ResidualBlock` gives, whose norms must fit."""
    assert isinstance(block.norm1, nn.GroupNorm) and isinstance(block.norm2, nn.GroupNorm)
    h = F.conv2d(group_norm(block.norm1, x, silu=True), block.conv1.weight, padding=1)
    h = F.conv2d(group_norm(block.norm2, h, silu=True, shift=block.conv1.bias), block.conv2.weight, padding=1)
    bias = block.conv2.bias
    assert bias is not None
    if block.conv_shortcut is not None:
        assert block.conv_shortcut.bias is not None
        x, bias = F.conv2d(x, block.conv_shortcut.weight), bias + block.conv_shortcut.bias
    x, h = (one.contiguous(memory_format=torch.channels_last) for one in (x, h))
    out = torch.empty_like(h)
    add[(-(-h.numel() // 1024),)](x, h, bias, out, h.numel(), h.shape[1], 1024)
    return out


def use_kernels(module: nn.Module) -> None:
    """Lets residual blocks and norms in front of a convolution inside of ``module`` run by the kernels, in place."""

    def run(part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if part is normed_convolution and fits(inputs[0]):
            norm, conv, x = inputs
            return conv(group_norm(norm, x, silu=True))
        return part(*inputs)

    for child in module.modules():
        if isinstance(child, ResidualBlock) and fits(child.norm1) and fits(child.norm2):
            child.forward = partial(residual_block, proxy(child))  # type: ignore[method-assign, arg-type]
        elif isinstance(child, Recomputing):
            child.run = run  # type: ignore[method-assign]
