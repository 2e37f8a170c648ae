"""Causal attention with dropout on a CPU, where torch draws the mask number by number, of scores that none may see too.

B batch, H heads, L tokens, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 2**16
"""Probabilities of dropout are rounded to multiples of one in so many: one random word of 64 bits makes four draws."""

BLOCK = 128
"""Queries that are looked at together, with the keys up to the last of them: half of the square is never computed."""


def dropped_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """What ``scaled_dot_product_attention`` gives of ``q``, ``k``, ``v`` (B, H, L, d) with a causal mask and dropout.

    The number of heads of ``k`` and ``v`` may divide that of ``q``. Values of 16 bits are computed with in float32, as
    torch does where it has no kernel; the result is of their type.
    """
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast and q.dtype == torch.float32 else q.dtype
    level = min(round(dropout * LEVELS), LEVELS - 1)
    with torch.autocast("cpu", enabled=False):
        q, k, v = (x.to(dtype).float() if dtype.itemsize < 4 else x for x in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        q, v = q * q.shape[-1] ** -0.5, v / (1 - level / LEVELS)
        seen = [(start, min(start + BLOCK, q.shape[2])) for start in range(0, q.shape[2], BLOCK)]
        blocks = [_block(q[:, :, start:end], k[:, :, :end], v[:, :, :end], level) for start, end in seen]
        return torch.cat(blocks, 2).to(dtype)


def _block(q: Tensor, k: Tensor, v: Tensor, level: int) -> Tensor:
    """The same of the last tokens, without what is multiplied with all queries and values."""
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu_(1 + k.shape[2] - q.shape[2])
    weights = (q @ k.transpose(2, 3)).masked_fill_(later, float("-inf")).softmax(-1)
    return weights.masked_fill(draw(weights.shape, level), 0.0) @ v


def draw(shape: torch.Size, level: int) -> Tensor:
    """A random mask of what is dropped, ``level`` of :data:`LEVELS` on average, by torch's generator of the CPU."""
    words = torch.empty((shape.numel() + 3) // 4, dtype=torch.int64, device="cpu").random_(-(2**63), None)
    draws = words.view(torch.int16)[: shape.numel()].view(shape)
    return draws < level - LEVELS // 2
