"""Keys and values of a context on a CPU: the part of a rollout that is arithmetic, which torch's products are good at.

B clips, P positions, K key/value heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ivideogpt.models.transformer import Attention, Block, SwiGLU, Transformer, rotate

BFLOAT16_PRODUCTS = ("avx512_bf16", "amx_bf16")
"""Instructions with which products of bfloat16 are faster than those of float32; without them they are slower."""


@cache
def has_bfloat16_products() -> bool:
    """Whether this processor multiplies matrices of bfloat16 faster than those of float32."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        known = ask()
        return any(known.get(name, False) for name in BFLOAT16_PRODUCTS)
    asks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in asks if ask is not None)


def context_dtype(precision: str) -> torch.dtype:
    """What the products of a context are of where the weights are stored in ``precision``.

    Weights of bfloat16 have no digits that products of bfloat16 would lose much of. Those of int8 and float16 do: with
    such products argmax ids would leave those of float32 more often than the weights alone make them.
    """
    return torch.bfloat16 if precision == "bfloat16" and has_bfloat16_products() else torch.float32


def pixels_dtype(precision: str) -> torch.dtype:
    """What the products of the pixel decoder are of, from which no token follows, in a rollout of ``precision``.

    float16 keeps frames as near to float32's as its weights keep the tokens.
    """
    coarse = precision in ("bfloat16", "int8")
    return torch.bfloat16 if coarse and has_bfloat16_products() else torch.float32


def context_keys_values(
    transformer: Transformer, tokens: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys, rotated, and values (B, K, P, d) of ``tokens`` (B, P), layer by layer.

    What the last layer makes of its keys and values is not computed: nobody asks for it.

    Args:
        transformer: in inference mode.
        tokens: (B, P).
        dtype: of the operands of products. Norms, rotary positions and the sum of all layers are float32.
    """
    x = transformer.embed(tokens).float()
    cos, sin = transformer.rope(torch.arange(tokens.shape[1]), torch.float32)

    def linear(x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))

    for index, layer in enumerate(transformer.layers):
        assert isinstance(layer, Block)
        attention, mlp = layer.self_attn, layer.mlp
        assert isinstance(attention, Attention) and isinstance(mlp, SwiGLU)

        def heads(x: Tensor, layer: nn.Linear, dim: int = attention.head_dim) -> Tensor:
            return linear(x, layer).unflatten(-1, (-1, dim)).transpose(1, 2)  # (B, heads, P, d)

        h = layer.input_layernorm(x).to(dtype)
        keys, values = rotate(heads(h, attention.k_proj).float(), cos, sin), heads(h, attention.v_proj)
        yield keys, values
        if index + 1 == len(transformer.layers):
            return
        query = rotate(heads(h, attention.q_proj).float(), cos, sin).to(dtype)
        seen = F.scaled_dot_product_attention(
            query, keys.to(dtype), values, is_causal=tokens.shape[1] > 1, enable_gqa=attention.grouped
        )
        x = x + linear(seen.transpose(1, 2).flatten(2), attention.o_proj)
        h = layer.post_attention_layernorm(x).to(dtype)
        gate = F.silu(linear(h, mlp.gate_proj), inplace=True)
        x = x + linear(gate.mul_(linear(h, mlp.up_proj)), mlp.down_proj)
