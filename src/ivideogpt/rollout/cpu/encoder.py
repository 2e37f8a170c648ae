"""Indices of frames on a CPU, with the tokenizer's encoders in tiled convolutions (``winograd.py``).

Its products stay float32: those of bfloat16 would pick other indices, from which everything else follows.

B frames, C channels, H x W pixels, N tokens of a context frame.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ivideogpt.models.autoencoder import Encoder
from ivideogpt.models.quantizer import VectorQuantizer
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.rollout.cpu.build import why_unavailable
from ivideogpt.rollout.cpu.winograd import tile_encoder
from ivideogpt.rollout.weights import Kept

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class TiledEncoder:
    """Gives a tokenizer's indices of context frames, with a copy of its weights as they are now.

    The indices are those of the tokenizer, but where two entries are equally near up to rounding.
    """

    def __init__(self, tokenizer: CompressiveTokenizer) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._encoder: Encoder = _copy(tokenizer.encoder)
            self._to_entries: nn.Conv2d = _copy(tokenizer.quant_conv)
            self._codebook: VectorQuantizer = _copy(tokenizer.quantize)
            self._to_latents = tile_encoder(self._encoder, tokenizer.config.resolution)

    @torch.no_grad()
    def indices(self, frames: Tensor) -> Tensor:
        """Indices (B, N) of ``frames`` (B, C, H, W)."""
        with torch.autocast("cpu", enabled=False):
            x = self._encoder.conv_in(frames.contiguous(memory_format=torch.channels_last))
            for stage in (*self._encoder.down_blocks, self._encoder.mid_block):
                x = stage(x)
            entries = self._to_entries(self._to_latents(x))  # (B, D, g, g)
            return self._codebook.nearest(entries.flatten(2).transpose(1, 2))


_encoders: Kept[TiledEncoder] = Kept()
_tokenizers: Kept[CompressiveTokenizer] = Kept()

WIDE = 64
"""Channels from which on tiles make the encoding of clips faster: with fewer, transforming them takes as long."""


def tiled_encoder_for(tokenizer: CompressiveTokenizer) -> TiledEncoder | None:
    """A :class:`TiledEncoder` of the tokenizer's weights as they are now; None where the kernels cannot run it."""
    if tokenizer.quant_conv.weight.device.type != "cpu":
        return None
    parts = (tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantize)
    kinds = {(weight.device.type, weight.dtype) for part in parts for weight in part.parameters()}
    if kinds != {("cpu", torch.float32)} or why_unavailable() is not None:
        return None
    return _encoders.get(tokenizer, None, lambda: TiledEncoder(tokenizer), parts)


def tiled_tokenizer_for(tokenizer: CompressiveTokenizer) -> CompressiveTokenizer | None:
    """A copy of a tokenizer, with its weights as they are now, that encodes many frames at once faster.

    It has no decoders and can't be trained. Its indices are those of the tokenizer, but where two entries are equally
    near up to rounding. None where the kernels cannot run it, or would gain nothing.
    """
    kinds = {(weight.device.type, weight.dtype) for weight in tokenizer.parameters()}
    narrow = min(tokenizer.config.block_channels) < WIDE
    if narrow or kinds != {("cpu", torch.float32)} or why_unavailable() is not None:
        _tokenizers.forget(tokenizer, lambda _: True)
        return None
    parts = [part for name, part in tokenizer.named_children() if "decoder" not in name]
    return _tokenizers.get(tokenizer, None, lambda: _tile(tokenizer), parts)


def _tile(tokenizer: CompressiveTokenizer) -> CompressiveTokenizer:
    with torch.inference_mode(False), torch.no_grad():
        made = tokenizer.without_decoders().requires_grad_(False).to(memory_format=torch.channels_last)
        for encoder in (made.encoder, made.cond_encoder):
            tile_encoder(encoder, made.config.resolution, small_map=0)  # all but the last convolution, which is small
        return made


def _copy(module: AnyModule) -> AnyModule:
    return copy.deepcopy(module).eval().requires_grad_(False).to(memory_format=torch.channels_last)
