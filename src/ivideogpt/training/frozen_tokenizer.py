"""FrozenTokenizer: the ids of clips by a tokenizer that is not trained, in the precision that the task asks for."""

from __future__ import annotations

import copy
from typing import Literal, get_args

import torch
from torch import Tensor

from ivideogpt.models.compiling import compiled
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.rollout.cpu.encoder import tiled_tokenizer_for

Precision = Literal["trainer", "bfloat16"]


def check_precision(name: str, value: Precision) -> Precision:
    """``value`` of the argument ``name``.

    Raises:
        ValueError: if it is no :data:`Precision`.
    """
    if value not in get_args(Precision):
        raise ValueError(f"{name} must be one of {get_args(Precision)}, got {value!r}")
    return value


class FrozenTokenizer:
    """Tokenizes clips without gradients. It is no ``nn.Module``: what it copies is in no checkpoint and never saved.

    In float32 on a CPU clips are encoded by compiled kernels where these are faster (``rollout/cpu/encoder.py``) with a
    copy of the weights as they are: the ids are the same but where two entries are equally near up to rounding.

    Args:
        tokenizer: frozen; its weights stay as they are.
        precision: ``"trainer"`` computes in the weights' own precision, under whatever autocast is on; ``"bfloat16"``
            with a copy of the encoders in bfloat16, which is cast once and not at each use, as autocast does with
            weights of a frozen module. The codebooks and the distances to them stay float32 in both.
        compile: compiles the encoders (``torch.compile``), where the kernels do not run them.
    """

    def __init__(
        self,
        tokenizer: CompressiveTokenizer,
        precision: Precision = "trainer",
        compile: bool = False,  # noqa: A002
    ) -> None:
        self.precision, self.compiles = check_precision("tokenizer_precision", precision), compile
        self._tokenizer = tokenizer.to(memory_format=torch.channels_last)  # strides alone: the weights are the same
        self._encoders: CompressiveTokenizer | None = None

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """Tokens (B, L) of ``video`` (B, T, C, H, W) in [0, 1]."""
        if self.precision == "trainer":
            tiled = self._tiled(video)
            return self._encode(self._tokenizer, video) if tiled is None else tiled.encode(video)
        if self._encoders is None or self._encoders.quantize.embedding.weight.device != video.device:
            self._encoders = _bfloat16_encoders(self._tokenizer).to(video.device)
        with torch.autocast(video.device.type, enabled=False):
            return self._encode(self._encoders, video.to(torch.bfloat16))

    def _encode(self, tokenizer: CompressiveTokenizer, video: Tensor) -> Tensor:
        encode = compiled(CompressiveTokenizer.encode) if self.compiles else CompressiveTokenizer.encode
        return encode(tokenizer, video)

    def _tiled(self, video: Tensor) -> CompressiveTokenizer | None:
        """What encodes ``video`` faster than the tokenizer; None if nothing does."""
        if video.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return None
        return tiled_tokenizer_for(self._tokenizer) if video.dtype == torch.float32 else None


def _bfloat16_encoders(tokenizer: CompressiveTokenizer) -> CompressiveTokenizer:
    """A copy that encodes in bfloat16."""
    encoders = tokenizer.without_decoders().to(torch.bfloat16)
    for name in ("quantize", "dynamics_quantize"):
        setattr(encoders, name, copy.deepcopy(getattr(tokenizer, name)).float())
    return encoders
