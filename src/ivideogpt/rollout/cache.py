"""KVCache: keys and values of a rollout in two parts, the shared context and what each row has added to it.

N layers, B clips, S rows a clip, R = B*S rows, K key/value heads, P positions of the context, M own positions,
d head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prefix:
    """Keys and values (N, B, K, P, d) of the clips' contexts; never written again, so that anybody may share them."""

    keys: Tensor
    values: Tensor

    @property
    def length(self) -> int:
        """P."""
        return self.keys.shape[3]


class KVCache:
    """A branch in torch: R rows behind their clips' prefixes, row b*S + s behind clip b.

    Args:
        prefix: of the B clips.
        samples: S.
        capacity: own positions that there is room for.

    Attributes:
        keys: (N, R, K, capacity, d) of the own positions.
        values: likewise.
        length: own positions that are filled. Setting it to a smaller number rewinds.
    """

    def __init__(self, prefix: Prefix, samples: int, capacity: int) -> None:
        layers, clips, heads, _, dim = prefix.keys.shape
        self.prefix = prefix
        self.samples = samples
        self.rows = clips * samples
        self.capacity = capacity
        self.length = 0
        # zeros, because a masked position is still multiplied, and memory that was never written may hold NaN
        self.keys = prefix.keys.new_zeros(layers, self.rows, heads, capacity, dim)
        self.values = torch.zeros_like(self.keys)

    def fork(self) -> KVCache:
        """An independent branch from here on: the prefix is shared, the filled own positions are copied."""
        copy = KVCache(self.prefix, self.samples, self.capacity)
        copy.length = self.length
        for mine, theirs in ((self.keys, copy.keys), (self.values, copy.values)):
            theirs[..., : self.length, :] = mine[..., : self.length, :]
        return copy

    def rest(self) -> None:
        """It holds nothing but its positions."""
