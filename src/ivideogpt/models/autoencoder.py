"""Convolutional encoder and decoder of the tokenizer, with the features of every level kept for cross-attention.

The names of the submodules are those of the published checkpoints, so that their state dicts load as they are.
B batch, C channels, H and W the spatial size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-6


class Recomputing(nn.Module):
    """Base of modules that can compute what stands in front of a convolution again in place of keeping it.

    Attributes:
        recomputes: whether a backward pass does so: norms, SiLUs, padding and doubling are cheap, and what they give is
            most of what there is to keep. The gradients are the same.
    """

    recomputes = False

    def run(self, part: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``part(*inputs)``, which ends in a convolution."""
        if self.recomputes and torch.is_grad_enabled():
            # recomputation stops where the convolution would keep its input, so it is not done twice itself
            return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
        return part(*inputs)


def normed_convolution(norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
    """Norm, SiLU, convolution."""
    return conv(F.silu(norm(x)))


def _padded_convolution(conv: nn.Module, x: Tensor) -> Tensor:
    return conv(F.pad(x, (0, 1, 0, 1)))


def _doubled_convolution(conv: nn.Module, x: Tensor) -> Tensor:
    return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResidualBlock(Recomputing):
    """Two 3x3 convolutions with group norm and SiLU in front, and a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, norm_num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_num_groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_num_groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.run(normed_convolution, self.norm1, self.conv1, x)
        h = self.run(normed_convolution, self.norm2, self.conv2, h)
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class SelfAttention(nn.Module):
    """Single-head self-attention over all positions of a feature map."""

    def __init__(self, channels: int, norm_num_groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(norm_num_groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        q, k, v = (layer(h).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.to_out[0](h).transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, self-attention if asked for, residual block."""

    def __init__(self, channels: int, norm_num_groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels, norm_num_groups) for _ in range(2)])
        self.attentions = nn.ModuleList([SelfAttention(channels, norm_num_groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(Recomputing):
    """3x3 convolution of stride 2, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(_padded_convolution, self.conv, x)


class Upsample(Recomputing):
    """Nearest-neighbour doubling and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(_doubled_convolution, self.conv, x)


class DownBlock(nn.Module):
    """Residual blocks of one encoder level, then a downsampling unless it is the last level."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, norm_num_groups: int, downsample: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_layers - 1)
        self.resnets = nn.ModuleList([ResidualBlock(width, out_channels, norm_num_groups) for width in widths])
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks of one decoder level, then an upsampling unless it is the last level."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, norm_num_groups: int, upsample: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (num_layers - 1)
        self.resnets = nn.ModuleList([ResidualBlock(width, out_channels, norm_num_groups) for width in widths])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(Recomputing):
    """Frames (B, in_channels, H, W) to latents (B, out_channels, H/f, W/f).

    Features, in order: after the first convolution, after each level, after the middle.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        mid_block_attention: bool,
    ) -> None:
        super().__init__()
        last = len(block_channels) - 1
        widths = (block_channels[0], *block_channels)
        self.conv_in = nn.Conv2d(in_channels, block_channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[i], widths[i + 1], layers_per_block, norm_num_groups, downsample=i != last)
            for i in range(last + 1)
        )
        self.mid_block = MidBlock(block_channels[-1], norm_num_groups, mid_block_attention)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_channels[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(block_channels[-1], out_channels, 3, padding=1)

    def forward(self, frames: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.conv_in(frames)
        features = [x]
        for block in self.down_blocks:
            x = block(x)
            features.append(x)
        x = self.mid_block(x)
        features.append(x)
        return self.run(normed_convolution, self.conv_norm_out, self.conv_out, x), features


class Decoder(Recomputing):
    """Latents (B, in_channels, h, w) to frames (B, out_channels, fh, fw).

    Features, in order: after the first convolution, after the middle, after each level.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_channels: tuple[int, ...],
        layers_per_block: int,
        norm_num_groups: int,
        mid_block_attention: bool,
    ) -> None:
        super().__init__()
        last = len(block_channels) - 1
        widths = (block_channels[-1], *reversed(block_channels))
        self.conv_in = nn.Conv2d(in_channels, block_channels[-1], 3, padding=1)
        self.mid_block = MidBlock(block_channels[-1], norm_num_groups, mid_block_attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[i], widths[i + 1], layers_per_block + 1, norm_num_groups, upsample=i != last)
            for i in range(last + 1)
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_channels[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(block_channels[0], out_channels, 3, padding=1)

    @property
    def stages(self) -> tuple[nn.Module, ...]:
        """The modules that run one after another; what each gives is one level of the features."""
        return (self.conv_in, self.mid_block, *self.up_blocks)

    def to_frames(self, x: Tensor) -> Tensor:
        """Frames (B, out_channels, fh, fw) of the last stage's features."""
        return self.run(normed_convolution, self.conv_norm_out, self.conv_out, x)

    def forward(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, features = latents, []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return self.to_frames(x), features
