"""Keys and values of a context on a CPU: the part of a rollout that is arithmetic.

B clips, P positions, K key/value heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivideogpt.models.transformer import Attention, Block, SwiGLU, Transformer, rotate
from ivideogpt.rollout.cpu.fixed import FixedRows


def context_keys_values(
    transformer: Transformer, tokens: Tensor, fixed: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys, rotated, and values (B, K, P, d) of ``tokens`` (B, P), layer by layer, float32 whatever the weights are.

    What the last layer makes of its keys and values is not computed: nobody asks for it.

    Args:
        transformer: whose weights are used as they are.
        tokens: the context.
        fixed: products by 16-bit integers (:mod:`ivideogpt.rollout.cpu.fixed`) in place of float32.
    """
    x = transformer.embed(tokens).float()
    cos, sin = transformer.rope(torch.arange(tokens.shape[1]), torch.float32)
    rows = FixedRows if fixed else _Rows

    for index, layer in enumerate(transformer.layers):
        assert isinstance(layer, Block)
        attention, mlp = layer.self_attn, layer.mlp
        assert isinstance(attention, Attention) and isinstance(mlp, SwiGLU)

        def heads(x: FixedRows | _Rows, layer: nn.Linear, dim: int = attention.head_dim) -> Tensor:
            return x.linear(layer.weight, layer.bias).unflatten(-1, (-1, dim)).transpose(1, 2)  # (B, heads, P, d)

        h = rows.of(layer.input_layernorm(x))
        keys, values = rotate(heads(h, attention.k_proj), cos, sin), heads(h, attention.v_proj)
        yield keys, values
        if index + 1 == len(transformer.layers):
            return
        query = rotate(heads(h, attention.q_proj), cos, sin)
        seen = F.scaled_dot_product_attention(
            query, keys, values, is_causal=tokens.shape[1] > 1, enable_gqa=attention.grouped
        )
        o_proj, gate_proj, up_proj, down_proj = attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
        x = rows.of(seen.transpose(1, 2).flatten(2)).linear(o_proj.weight, o_proj.bias, x)
        h = rows.of(layer.post_attention_layernorm(x))
        up, gate = h.linear(up_proj.weight, up_proj.bias), h.linear(gate_proj.weight, gate_proj.bias)
        x = rows.of(up, gate).linear(down_proj.weight, down_proj.bias, x)


@dataclass(frozen=True)
class _Rows:
    """Rows of float32, with the face of :class:`FixedRows`."""

    x: Tensor

    @classmethod
    def of(cls, x: Tensor, gate: Tensor | None = None) -> _Rows:
        return cls(x if gate is None else F.silu(gate, inplace=True).mul_(x))

    def linear(self, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        y = F.linear(self.x, weight.float(), None if bias is None else bias.float())
        return y if residual is None else residual + y
