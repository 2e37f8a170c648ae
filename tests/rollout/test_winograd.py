"""Tiled convolutions are the convolutions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ivideogpt.models import CompressiveTokenizer
from ivideogpt.rollout.cpu import why_unavailable, winograd

Build = Callable[..., Any]

needs_kernels = pytest.mark.skipif(why_unavailable() is not None, reason=f"no compiled kernels: {why_unavailable()}")


@needs_kernels
@pytest.mark.parametrize("kind", [4, 2, 0])
@torch.no_grad()
def test_tiled_convolution(kind: int) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(48, 20, 3, padding=1), nn.GroupNorm(6, 48)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, 48, 8, 16) * 3 + 7  # a mean that squares would drown in
    seen = nn.functional.interpolate(x, scale_factor=2.0) if kind == 0 else x
    tiled = winograd.TiledConvolution(conv, kind)
    torch.testing.assert_close(tiled(x), conv(seen), atol=3e-5, rtol=1e-4)
    if kind:
        normed = conv(nn.functional.silu(norm(x)))
        torch.testing.assert_close(tiled(x, winograd.norm_coefficients(norm, x)), normed, atol=3e-5, rtol=1e-4)
        conv = nn.Conv2d(48, 32, 3, padding=1)
        residual = torch.randn(3, 32, 8, 16)
        out = winograd.TiledConvolution(conv, kind)(x, residual=residual)
        torch.testing.assert_close(out, conv(x) + residual, atol=3e-5, rtol=1e-4)


@needs_kernels
@pytest.mark.parametrize("kind", [4, 2, 0])
@torch.no_grad()
def test_products_of_bfloat16(kind: int) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(48, 32, 3, padding=1), torch.randn(2, 48, 8, 16)
    residual = torch.randn(2, 32, 16 if kind == 0 else 8, 32 if kind == 0 else 16)
    exact = winograd.TiledConvolution(conv, kind)(x, residual=residual)
    found = winograd.TiledConvolution(conv, kind, torch.bfloat16)(x, residual=residual)
    assert found.dtype == torch.float32
    error = (found - exact).norm() / (exact - residual).norm()
    assert 1e-4 < error < 2e-2  # other numbers, and eight bits of them


def test_products_of_bfloat16_only_where_little_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("float32", "bfloat16", "float16", "int8")
    half, full = torch.bfloat16, torch.float32
    monkeypatch.setattr(winograd, "has_bfloat16_products", lambda: True)
    assert [winograd.pixels_dtype(name) for name in names] == [full, half, full, half]
    monkeypatch.setattr(winograd, "has_bfloat16_products", lambda: False)
    assert {winograd.pixels_dtype(name) for name in names} == {full}


@needs_kernels
def test_rounding_to_bfloat16_is_torchs() -> None:
    x = torch.randn(1, 8, 8, 16)
    x[0, 0, 0, :6] = torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 3e38, -1e-38])  # ties, and near the ends
    products = torch.empty(9, 64, 16, dtype=torch.bfloat16)
    winograd._kernels().ivideogpt_transform(
        0, 1, *map(winograd._pointer, (x, None, None, products)), *winograd._sizes(1, 8, 8, 16), 1
    )
    assert torch.equal(products[4], x.view(64, 16).bfloat16())  # the product in the middle is of the pixels themselves


@needs_kernels
@torch.no_grad()
def test_silu_of_extreme_values() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    for channel in range(16):
        conv.weight[channel, channel, 1, 1] = 1.0
    x = torch.linspace(-100, 100, 16 * 64).reshape(1, 16, 8, 8)
    x[0, 0, 0, :4] = torch.tensor([-1e4, -88.0, 0.0, 88.0])
    same = (torch.ones(1, 16), torch.zeros(1, 16))
    out = winograd.TiledConvolution(conv, 2)(x, same)
    torch.testing.assert_close(out, nn.functional.silu(x), atol=2e-5, rtol=1e-5)


@needs_kernels
def test_every_convolution_of_a_fitting_decoder_is_tiled(tiny_config: Build) -> None:
    config = tiny_config(block_channels=(16, 32, 32), layers_per_block=2).tokenizer
    decoder = CompressiveTokenizer(config).cond_decoder
    winograd.use_tiles(decoder, 8)
    left = [name for name, module in decoder.named_modules() if isinstance(module, nn.Conv2d)]
    assert {name.rpartition(".")[2] for name in left} == {"conv_in", "conv_out", "conv_shortcut"}


@needs_kernels
def test_every_convolution_of_a_fitting_encoder_is_tiled(tiny_config: Build) -> None:
    config = tiny_config(block_channels=(16, 32, 32), layers_per_block=2).tokenizer
    encoder = CompressiveTokenizer(config).encoder
    last = winograd.tile_encoder(encoder, config.resolution)
    assert isinstance(last, winograd.TiledOutput)
    left = [name for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d)]
    assert {name.rpartition(".")[2] for name in left} == {"conv_in", "conv_out", "conv_shortcut", "conv"}
    assert sum(name.endswith(".conv") for name in left) == 2  # of stride 2
