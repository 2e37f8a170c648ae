"""FrameStream: decodes each frame while the tokens of the next are drawn.

B clips, S samples a clip, R rows of a span, F future frames, n tokens of a frame.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ivideogpt.layout import TokenLayout
from ivideogpt.rollout.memory import Span
from ivideogpt.rollout.pixels import ContextFeatures, PixelDecoder


class FrameStream:
    """Frames (B*S, F, C, H, W) of a rollout, decoded one by one as their tokens come.

    On a GPU this is done on a stream beside the token loop's, which leaves most of the device idle. On a CPU both would
    want the same cores; there frames are decoded together at the end, and this serves tests only.

    Args:
        pixels: decodes the frames.
        context: of the B clips.
        layout: token arithmetic of the model.
        samples: S.
        horizon: F.
    """

    def __init__(
        self, pixels: PixelDecoder, context: ContextFeatures, layout: TokenLayout, samples: int, horizon: int
    ) -> None:
        self._pixels, self._context, self._layout = pixels, context, layout
        config = pixels.config
        shape = (context.clips * samples, horizon, config.out_channels, config.resolution, config.resolution)
        self._frames = torch.empty(shape, device=pixels.device, dtype=torch.float32)
        self._stream = torch.cuda.Stream(pixels.device) if pixels.device.type == "cuda" else None

    def take(self, span: Span, rows: Tensor, index: int, tokens: Tensor) -> None:
        """Decodes frame ``index`` of the ``rows`` (R,) of a span, from its ``tokens`` (R, n)."""
        indices = self._layout.dynamics_indices(tokens).unflatten(0, (span.clips, span.samples))
        beside: AbstractContextManager[Any] = nullcontext()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            for used in (indices, rows, self._frames):
                used.record_stream(self._stream)  # their memory is not given to others before this stream is done
            beside = torch.cuda.stream(self._stream)
        with beside:
            frames = self._pixels.decode(indices, self._context.select(slice(span.first, span.last)))
            self._frames[rows, index] = frames.flatten(0, 1)

    def frames(self) -> Tensor:
        """All frames; the current stream waits for them."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        return self._frames
