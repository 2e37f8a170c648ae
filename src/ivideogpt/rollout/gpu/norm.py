"""Group norm and SiLU of channels-last maps, in two Triton kernels: sums of parts of a map, then all the rest.

B maps of C channels and H W = P pixels, stored pixel by pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from ivideogpt.models.autoencoder import Recomputing, normed_convolution

TILE = 8192
"""Values that a program reads."""


@triton.jit
def part_sums(
    x, sums, pixels, parts, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Sums and sums of squares of a part's pixels, a channel each: ``sums`` (B, parts, 2, CHANNELS)."""
    part = tl.program_id(0)
    image = tl.program_id(1)
    channels = tl.arange(0, BLOCK_C)
    inside = channels < CHANNELS
    pixel = part * BLOCK_P + tl.arange(0, BLOCK_P)
    seen = (pixel < pixels)[:, None] & inside[None, :]
    at = (image.to(tl.int64) * pixels + pixel)[:, None] * CHANNELS + channels[None, :]
    values = tl.load(x + at, mask=seen, other=0.0).to(tl.float32)
    out = sums + (image * parts + part) * 2 * CHANNELS + channels
    tl.store(out, tl.sum(values, axis=0), mask=inside)
    tl.store(out + CHANNELS, tl.sum(values * values, axis=0), mask=inside)


@triton.jit
def normalize(
    x, sums, weight, bias, out, pixels, parts, eps,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The norm of a part's pixels, by groups of GROUP channels, and its SiLU."""
    part = tl.program_id(0)
    image = tl.program_id(1)
    channels = tl.arange(0, BLOCK_C)
    inside = channels < CHANNELS
    total = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        one = first + tl.arange(0, BLOCK_PARTS)
        seen = (one < parts)[:, None] & inside[None, :]
        at = sums + (image * parts + one)[:, None] * 2 * CHANNELS + channels[None, :]
        total += tl.sum(tl.load(at, mask=seen, other=0.0), axis=0)
        squares += tl.sum(tl.load(at + CHANNELS, mask=seen, other=0.0), axis=0)
    count = GROUP * pixels
    group_total = tl.sum(tl.reshape(total, [BLOCK_C // GROUP, GROUP]), axis=1) / count
    group_squares = tl.sum(tl.reshape(squares, [BLOCK_C // GROUP, GROUP]), axis=1) / count
    inverse = tl.rsqrt(tl.maximum(group_squares - group_total * group_total, 0.0) + eps)
    spread = tl.zeros([BLOCK_C // GROUP, GROUP], tl.float32)
    mean = tl.reshape(spread + group_total[:, None], [BLOCK_C])
    scale = tl.reshape(spread + inverse[:, None], [BLOCK_C])
    scale = scale * tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32) - mean * scale
    pixel = part * BLOCK_P + tl.arange(0, BLOCK_P)
    wanted = (pixel < pixels)[:, None] & inside[None, :]
    at = (image.to(tl.int64) * pixels + pixel)[:, None] * CHANNELS + channels[None, :]
    values = tl.load(x + at, mask=wanted, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if SILU:
        values = values * tl.sigmoid(values)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=wanted)


def fits(norm: nn.Module) -> bool:
    """Whether the kernels know this norm: channels and groups of them that are powers of two."""
    if not isinstance(norm, nn.GroupNorm) or not norm.affine:
        return False
    group = norm.num_channels // norm.num_groups
    return norm.num_channels & (norm.num_channels - 1) == 0 and group & (group - 1) == 0 and norm.num_channels <= TILE


def group_norm(norm: nn.GroupNorm, x: Tensor, silu: bool) -> Tensor:
    """``norm(x)`` of ``x`` (B, C, H, W), and the SiLU of that; sums are float32."""
    x = x.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = x.shape
    pixels = height * width
    block = max(1, min(TILE // channels, pixels // 32))  # small maps are spread over the device
    block = 1 << (block.bit_length() - 1)
    parts = -(-pixels // block)
    sums = torch.empty(images, parts, 2, channels, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    part_sums[(parts, images)](x, sums, pixels, parts, channels, channels, block)
    normalize[(parts, images)](
        x, sums, norm.weight, norm.bias, out, pixels, parts, norm.eps,
        channels, channels, channels // norm.num_groups, block, max(1, min(64, TILE // channels)), silu,
    )  # fmt: skip
    return out


def agrees(device: torch.device) -> bool:
    """Whether the kernels give what torch gives, on a small map on ``device``."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(4, 32, device=device)
    x = torch.randn(2, 32, 8, 8, generator=generator).to(device)
    with torch.no_grad():
        return torch.allclose(group_norm(norm, x, silu=True), F.silu(norm(x)), atol=1e-5)


def use_kernels(module: nn.Module) -> None:
    """Lets all norms in front of a convolution inside of ``module`` run by these kernels, in place."""

    def run(part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if part is normed_convolution and fits(inputs[0]):
            norm, conv, x = inputs
            return conv(group_norm(norm, x, silu=True))
        return part(*inputs)

    for child in module.modules():
        if isinstance(child, Recomputing):
            child.run = run  # type: ignore[method-assign]
