"""Which decoder runs a transformer on this machine, made once and kept as long as the weights stay what they are."""

from __future__ import annotations

import torch

from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.cpu import KernelDecoder, supported
from ivideogpt.rollout.decoder import Decoder
from ivideogpt.rollout.fused import DTYPES, TorchDecoder
from ivideogpt.rollout.gpu import why_unavailable
from ivideogpt.rollout.weights import Kept

PRECISIONS = ("float32", "bfloat16", "float16", "int8")

_decoders: Kept[Decoder] = Kept()


def own_precision(transformer: Transformer) -> str:
    """The precision that the weights are in."""
    dtype = transformer.lm_head.weight.dtype
    return next(name for name, known in DTYPES.items() if known == dtype)


def decoder_for(transformer: Transformer, precision: str | None = None) -> Decoder:
    """A decoder of the transformer's weights as they are now.

    On a CPU it is the compiled kernel where that can be had and knows the transformer, else torch operations.

    Args:
        transformer: whose weights are copied, unless a copy of these weights is at hand.
        precision: one of ``PRECISIONS``; None is the one that the weights are in.

    Raises:
        ValueError: if the precision is unknown or cannot be had on this machine, or if a module of the transformer was
            replaced by one that rollouts do not know.
    """
    own = own_precision(transformer)
    if precision is None:
        precision = own
    if precision not in (*PRECISIONS, own):
        raise ValueError(f"precision must be auto or one of {', '.join(PRECISIONS)}, got {precision!r}")
    device = transformer.lm_head.weight.device
    obstacle = supported(transformer, precision) if device.type == "cpu" else "it is for CPUs"
    return _decoders.get(transformer, (precision, obstacle), lambda: _make(transformer, precision, device, obstacle))


def forget(transformer: Transformer, precision: str) -> None:
    """Drops the copy of the weights in one precision."""
    _decoders.forget(transformer, lambda options: isinstance(options, tuple) and options[0] == precision)


def _make(transformer: Transformer, precision: str, device: torch.device, obstacle: str | None) -> Decoder:
    if obstacle is None:
        return KernelDecoder(transformer, precision)
    slow = precision == "float16" and device.type == "cpu"
    if precision == "int8" or (slow and own_precision(transformer) != "float16"):
        raise ValueError(
            f"precision {precision!r} on {device} needs the compiled CPU kernel, which cannot run here: {obstacle}; "
            "use float32 or bfloat16"
        )
    if device.type == "cuda":
        if why_unavailable(transformer, precision) is None:
            from ivideogpt.rollout.gpu.decoder import TritonDecoder

            return TritonDecoder(transformer, precision)
        from ivideogpt.rollout.graphs import GraphDecoder

        return GraphDecoder(transformer, precision)
    return TorchDecoder(transformer, precision)


def available_precisions(transformer: Transformer) -> tuple[str, ...]:
    """What ``precision`` may be for this transformer where it is."""
    if transformer.lm_head.weight.device.type != "cpu":
        return ("float32", "bfloat16", "float16")
    return tuple(name for name in PRECISIONS if name in ("float32", "bfloat16") or supported(transformer, name) is None)
