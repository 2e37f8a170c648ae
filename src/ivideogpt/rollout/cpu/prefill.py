"""Keys and values of a context on a CPU: the part of a rollout that is arithmetic, which torch's products are good at.

B clips, P positions, K key/value heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivideogpt.models.transformer import Attention, Block, SwiGLU, Transformer, rotate


def context_keys_values(transformer: Transformer, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys, rotated, and values (B, K, P, d) of ``tokens`` (B, P), layer by layer, in float32 whatever the weights are.

    What the last layer makes of its keys and values is not computed: nobody asks for it.
    """
    x = transformer.embed(tokens).float()
    cos, sin = transformer.rope(torch.arange(tokens.shape[1]), torch.float32)

    def linear(x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())

    for index, layer in enumerate(transformer.layers):
        assert isinstance(layer, Block)
        attention, mlp = layer.self_attn, layer.mlp
        assert isinstance(attention, Attention) and isinstance(mlp, SwiGLU)

        def heads(x: Tensor, layer: nn.Linear, dim: int = attention.head_dim) -> Tensor:
            return linear(x, layer).unflatten(-1, (-1, dim)).transpose(1, 2)  # (B, heads, P, d)

        h = layer.input_layernorm(x)
        keys, values = rotate(heads(h, attention.k_proj), cos, sin), heads(h, attention.v_proj)
        yield keys, values
        if index + 1 == len(transformer.layers):
            return
        query = rotate(heads(h, attention.q_proj), cos, sin)
        seen = F.scaled_dot_product_attention(
            query, keys, values, is_causal=tokens.shape[1] > 1, enable_gqa=attention.grouped
        )
        x = x + linear(seen.transpose(1, 2).flatten(2), attention.o_proj)
        h = layer.post_attention_layernorm(x)
        gate = F.silu(linear(h, mlp.gate_proj), inplace=True)
        x = x + linear(gate.mul_(linear(h, mlp.up_proj)), mlp.down_proj)
