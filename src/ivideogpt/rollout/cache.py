"""KVCache: the keys and values of every position that a rollout has been through, in one block for its whole life.

N layers, B batch, K key/value heads, L new positions, d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of a transformer's layers in blocks (N, B, K, capacity, d), filled from the front.

    The blocks are allocated once, at the first update, in the shape and dtype of what is stored: so grouped-query
    attention, bf16 weights and autocast need no settings here. Positions are contiguous: an update stores the L
    positions that follow the ``length`` filled ones, and the last layer's update moves ``length`` on.

    Args:
        num_layers: layers of the transformer.
        capacity: positions that the cache can hold.
        device: device of the positions that :meth:`next_positions` returns.

    Attributes:
        length: filled positions. Setting it to a smaller number rewinds: what lies behind is overwritten.
    """

    def __init__(self, num_layers: int, capacity: int, device: torch.device | str | None = None) -> None:
        self.num_layers = num_layers
        self.capacity = capacity
        self.length = 0
        self._positions = torch.arange(capacity, device=device)
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._layers: list[tuple[Tensor, Tensor]] = []

    def next_positions(self, count: int) -> Tensor:
        """Positions (count,) that follow the filled ones: the ``input_pos`` of the next update."""
        return self._positions[self.length : self.length + count]

    def update(self, layer: int, input_pos: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values (B, K, L, d) of one layer behind the filled positions.

        Args:
            layer: index of the layer; layers come in order.
            input_pos: (L,), the positions as :meth:`next_positions` gave them. Their values are not read, which on
                an accelerator would make the host wait for the device at each layer.
            keys: (B, K, L, d).
            values: (B, K, L, d).

        Returns:
            Views (B, K, length + L, d) of the layer's keys and values.
        """
        if self._keys is None:
            self._allocate(keys, values)
        count = keys.shape[2]
        end = self.length + count
        assert end <= self.capacity, f"{end} positions do not fit into a cache of {self.capacity}"
        all_keys, all_values = self._layers[layer]
        all_keys.narrow(2, self.length, count).copy_(keys)
        all_values.narrow(2, self.length, count).copy_(values)
        if layer == self.num_layers - 1:
            self.length = end
        return all_keys.narrow(2, 0, end), all_values.narrow(2, 0, end)

    def fork(self, repeats: int = 1) -> KVCache:
        """An independent copy, each batch row repeated ``repeats`` times in place; only filled positions are copied."""
        copy = KVCache.__new__(KVCache)
        copy.num_layers, copy.capacity, copy.length = self.num_layers, self.capacity, self.length
        copy._positions = self._positions
        copy._keys, copy._values, copy._layers = None, None, []
        if self._keys is not None and self._values is not None:
            copy._set_blocks(self._copy_block(self._keys, repeats), self._copy_block(self._values, repeats))
        return copy

    def _copy_block(self, block: Tensor, repeats: int) -> Tensor:
        layers, batch, heads, capacity, dim = block.shape
        copy = block.new_empty(layers, batch * repeats, heads, capacity, dim)
        rows = copy.unflatten(1, (batch, repeats))  # (N, B, repeats, K, capacity, d)
        rows[:, :, :, :, : self.length] = block[:, :, None, :, : self.length]
        return copy

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        batch, heads, _, dim = keys.shape
        shape = (self.num_layers, batch, heads, self.capacity, dim)
        self._set_blocks(keys.new_empty(shape), values.new_empty(shape))

    def _set_blocks(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values
        self._layers = list(zip(keys.unbind(0), values.unbind(0), strict=True))
