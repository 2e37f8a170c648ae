"""What the processor at hand can do, for choices that change a model's speed and not its results."""

from __future__ import annotations

import platform
from functools import cache

import torch

BFLOAT16_PRODUCTS = ("avx512_bf16", "amx_bf16")
"""Instructions for products of bfloat16; a processor without them does them slower than those of float32."""


@cache
def has_bfloat16_products() -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is not None:
        known = ask()
        return any(known.get(name, False) for name in BFLOAT16_PRODUCTS)
    asks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in asks if ask is not None)


def has_slow_bfloat16() -> bool:
    """Whether products of bfloat16 are known to be slower than those of float32 on this processor.

    Of processors of other makes than x86 nothing is known.
    """
    return platform.machine() in ("x86_64", "AMD64") and not has_bfloat16_products()
