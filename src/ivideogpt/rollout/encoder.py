"""Indices of context frames on a GPU: the tokenizer's encoder as one CUDA graph, as a person who waits needs it.

B clips, t0 context frames, C channels, H x W pixels, N tokens of a context frame.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ivideogpt.models.autoencoder import Encoder
from ivideogpt.models.quantizer import VectorQuantizer
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.rollout.capture import FEW_CLIPS, Captured
from ivideogpt.rollout.weights import Kept


class GraphEncoder:
    """Gives a tokenizer's indices of context frames, with a copy of its weights as they are now, in their precision."""

    def __init__(self, tokenizer: CompressiveTokenizer) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._encoder: Encoder = copy.deepcopy(tokenizer.encoder).eval().requires_grad_(False)
            self._to_entries: nn.Conv2d = copy.deepcopy(tokenizer.quant_conv).requires_grad_(False)
            self._codebook: VectorQuantizer = copy.deepcopy(tokenizer.quantize).eval().requires_grad_(False)
        most = FEW_CLIPS * tokenizer.config.context_length
        self._captured = Captured(self._indices, "encoding the context", most)

    def indices(self, frames: Tensor) -> Tensor:
        """Indices (B*t0, N) of ``frames`` (B*t0, C, H, W)."""
        return self._captured(frames)[0]

    @torch.no_grad()
    def _indices(self, frames: Tensor) -> list[Tensor]:
        with torch.autocast(frames.device.type, enabled=False):
            latents = self._to_entries(self._encoder(frames)[0])
            return [self._codebook.nearest(latents.flatten(2).transpose(1, 2))]


_encoders: Kept[GraphEncoder] = Kept()


def graph_encoder_for(tokenizer: CompressiveTokenizer) -> GraphEncoder | None:
    """A :class:`GraphEncoder` of the tokenizer's weights as they are now; None off a GPU."""
    if next(tokenizer.parameters()).device.type != "cuda":
        return None
    parts = (tokenizer.encoder, tokenizer.quant_conv, tokenizer.quantize)
    return _encoders.get(tokenizer, None, lambda: GraphEncoder(tokenizer), parts)
