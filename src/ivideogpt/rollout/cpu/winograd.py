"""Convolutions on a CPU with a quarter of the multiplications, by compiled kernels (see ``winograd.cpp``).

A 3x3 convolution becomes matrix products of transformed tiles with transformed weights: 36 multiplications for 16
outputs of a channel in place of 144, the same result but for rounding, which is up to twice that of a direct
convolution. Nearest-neighbour doubling and the convolution behind it become 9 multiplications for 4 outputs in place
of 36. The kernels also do the group norm and the SiLU in front, and the bias and the residual behind.


B batch, C channels, H and W the spatial size, N products of a tile in each direction.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivideogpt.models.autoencoder import Decoder, Encoder, ResidualBlock, Upsample, normed_convolution
from ivideogpt.models.processor import has_bfloat16_products
from ivideogpt.rollout.cpu.build import load_kernel

LANES = 16
"""The kernels take channels in groups of so many."""

PRODUCTS_AT_ONCE = 2**22
"""Floats of transformed input or output that a convolution holds at once (16 MB): more images are done in turns."""

SMALL_MAP = 16
"""Width of the maps whose frames make so few tiles that their convolutions are bound by reading the weights."""


def pixels_dtype(precision: str) -> torch.dtype:
    """What the products of the pixel decoder are of, from which no token follows, in a rollout of ``precision``.

    float16 keeps frames as near to float32's as its weights keep the tokens.
    """
    coarse = precision in ("bfloat16", "int8")
    return torch.bfloat16 if coarse and has_bfloat16_products() else torch.float32


def _kernels() -> ctypes.CDLL:
    library = load_kernel()
    assert library is not None
    return library


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _sizes(*sizes: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in sizes]


def _image(x: Tensor) -> Tensor:
    assert x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[1] % LANES == 0, (x.dtype, x.shape)
    return x.contiguous(memory_format=torch.channels_last)


Coefficients = tuple[Tensor, Tensor]
"""Scale and shift (B, C) that a group norm multiplies with and adds."""


def norm_coefficients(norm: nn.GroupNorm, x: Tensor) -> Coefficients:
    """What ``norm`` does to ``x`` (B, C, H, W) channel by channel."""
    batch, channels, height, width = x.shape
    x = _image(x)
    scale, shift = x.new_empty(batch, channels), x.new_empty(batch, channels)
    _kernels().ivideogpt_norm_coefficients(
        *map(_pointer, (x, norm.weight, norm.bias, scale, shift)),
        *_sizes(batch, height * width, channels, norm.num_groups),
        ctypes.c_float(norm.eps),
        torch.get_num_threads(),
    )
    return scale, shift


_FOUR = [[1.0, 0.0, 0.0]] + [
    [1 / (2 * p * (p - q)), sign * p**0.5 / (2 * p * (p - q)), p / (2 * p * (p - q))]
    for p, q in ((0.5, 2.0), (2.0, 0.5))  # the squares of the points
    for sign in (1, -1)
] + [[0.0, 0.0, 1.0]]  # fmt: skip
_TWO = [[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]]
_DOUBLING = [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]
WEIGHT_TRANSFORMS = {4: _FOUR, 2: _TWO, 0: _DOUBLING}
STEPS = {4: 4, 2: 2, 0: 1}
"""Pixels of the input from tile to tile, by kind of tile."""


class TiledConvolution(nn.Module):
    """A 3x3 convolution with zeros around the map.

    Args:
        conv: whose weights are transformed.
        kind: 4 or 2, the outputs of a tile in each direction; 0 to double the map before the convolution.
        products: what is multiplied: float32, or bfloat16 where the processor is faster with it. All else is float32.
    """

    def __init__(self, conv: nn.Conv2d, kind: int, products: torch.dtype = torch.float32) -> None:
        super().__init__()
        assert products in (torch.float32, torch.bfloat16), products
        assert conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.bias is not None
        self.kind, self.out_channels = kind, conv.out_channels
        filled = -conv.out_channels % LANES  # channels of zeros, for the last convolution
        transform = torch.tensor(WEIGHT_TRANSFORMS[kind], dtype=torch.float64)
        weight = conv.weight.detach().double().permute(2, 3, 1, 0).flatten(0, 1)  # (9, C_in, C_out)
        weight = (torch.kron(transform, transform) @ weight.flatten(1)).float().unflatten(1, weight.shape[1:])
        weight = F.pad(weight, (0, filled))
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight.to(products).contiguous())  # (N*N, C_in, C_out)
        self.register_buffer("bias", F.pad(conv.bias.detach().float(), (0, filled)))

    def forward(self, x: Tensor, coefficients: Coefficients | None = None, residual: Tensor | None = None) -> Tensor:
        """The convolution of ``x`` (B, C, H, W), or of the SiLU of the normed ``x``, plus ``residual``."""
        batch, channels, height, width = x.shape
        x, step, grown = _image(x), STEPS[self.kind], 1 if self.kind else 2
        products, _, out_channels = self.weight.shape
        tiles = (height // step, width // step)
        y = x.new_empty(batch, height * grown, width * grown, out_channels)
        if residual is not None:
            residual = _image(residual).permute(0, 2, 3, 1)
        kernels, threads, half = _kernels(), torch.get_num_threads(), int(self.weight.dtype == torch.bfloat16)
        at_once = max(1, PRODUCTS_AT_ONCE // (products * tiles[0] * tiles[1] * max(channels, out_channels)))
        for start in range(0, batch, at_once):
            images = slice(start, start + at_once)
            count = len(x[images])
            before = self.weight.new_empty(products, count * tiles[0] * tiles[1], channels)
            scale, shift = (None, None) if coefficients is None else (part[images] for part in coefficients)
            kernels.ivideogpt_transform(
                self.kind, half, *map(_pointer, (x[images], scale, shift, before)),
                *_sizes(count, height, width, channels), threads,
            )  # fmt: skip
            after = torch.bmm(before, self.weight)
            del before
            add = None if residual is None else residual[images]
            kernels.ivideogpt_transform_back(
                self.kind, half, *map(_pointer, (after, self.bias, add, y[images])),
                *_sizes(count, *tiles, out_channels), threads,
            )  # fmt: skip
        return y.permute(0, 3, 1, 2)[:, : self.out_channels]


class TiledResidualBlock(nn.Module):
    """:class:`ResidualBlock` in two tiled convolutions."""

    def __init__(self, block: ResidualBlock, kind: int, products: torch.dtype) -> None:
        super().__init__()
        self.norm1, self.norm2, self.conv_shortcut = block.norm1, block.norm2, block.conv_shortcut
        self.conv1 = TiledConvolution(block.conv1, kind, products)
        self.conv2 = TiledConvolution(block.conv2, kind, products)

    def forward(self, x: Tensor) -> Tensor:
        x = _image(x)
        h = self.conv1(x, norm_coefficients(self.norm1, x))
        if self.conv_shortcut is not None:
            weight = self.conv_shortcut.weight.flatten(1)
            x = F.linear(x.permute(0, 2, 3, 1), weight, self.conv_shortcut.bias).permute(0, 3, 1, 2)
        return self.conv2(h, norm_coefficients(self.norm2, h), residual=x)


class TiledOutput(nn.Module):
    """The last norm, SiLU and convolution of a decoder or an encoder, the convolution tiled."""

    def __init__(self, coder: Decoder | Encoder, kind: int) -> None:
        super().__init__()
        self.norm, self.conv = coder.conv_norm_out, TiledConvolution(coder.conv_out, kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, norm_coefficients(self.norm, x))


def use_tiles(decoder: Decoder, grid_size: int, products: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
    """Replaces, in place, what of ``decoder`` the kernels can do.

    Args:
        decoder: of float32 on the CPU; a copy, as it cannot be trained any more.
        grid_size: side of the latents that it will be given.
        products: of all convolutions but the one that gives the pixels, whose errors nothing would smooth.

    Returns:
        What stands for ``decoder.to_frames``.
    """
    width = grid_size
    for index, stage in enumerate((decoder.mid_block, *decoder.up_blocks)):
        _tile(stage, kind_for(width), products)
        if 0 < index < len(decoder.up_blocks):
            width *= 2
    kind = kind_for(width)
    return TiledOutput(decoder, kind) if kind and decoder.conv_out.in_channels % LANES == 0 else decoder.to_frames


def tile_encoder(encoder: Encoder, resolution: int, small_map: int = SMALL_MAP) -> Callable[[Tensor], Tensor]:
    """Replaces, in place, what of ``encoder`` the kernels can do: all but the first convolution and those of stride 2.

    Args:
        encoder: of float32 on the CPU; a copy, as it cannot be trained any more.
        resolution: side of the frames that it will be given.
        small_map: width up to which maps get the smaller tiles; 0 for many frames at once, which share the weights.

    Returns:
        What makes latents of what the middle block gives.
    """
    width = resolution
    for index, stage in enumerate((*encoder.down_blocks, encoder.mid_block)):
        _tile(stage, kind_for(width, small_map), torch.float32)
        if index + 1 < len(encoder.down_blocks):
            width //= 2
    kind = kind_for(width, small_map)
    if kind and encoder.conv_out.in_channels % LANES == 0:
        return TiledOutput(encoder, kind)
    return partial(normed_convolution, encoder.conv_norm_out, encoder.conv_out)


def _tile(stage: nn.Module, kind: int, products: torch.dtype) -> None:
    for parent in list(stage.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ResidualBlock) and kind and _fits(child.conv1, child.conv2):
                setattr(parent, name, TiledResidualBlock(child, kind, products))
            elif isinstance(child, Upsample) and _fits(child.conv):
                setattr(parent, name, TiledConvolution(child.conv, 0, products))


def kind_for(width: int, small_map: int = SMALL_MAP) -> int:
    """The faster kind of tiles for maps so wide, 0 if none divides it.

    On maps up to ``small_map`` the time goes into reading the weights, of which the smaller tiles have 16 in place of
    36.
    """
    if width > small_map and width % STEPS[4] == 0:
        return 4
    return 2 if width % STEPS[2] == 0 else 0


def _fits(*convs: nn.Conv2d) -> bool:
    return all(conv.in_channels % LANES == 0 and conv.out_channels % LANES == 0 for conv in convs)
