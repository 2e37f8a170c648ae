"""A context's keys and values on a CPU are the transformer's own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt.models import Transformer
from ivideogpt.rollout.cpu.fixed import has_fixed_products
from ivideogpt.rollout.cpu.prefill import context_keys_values

Build = Callable[..., Any]


class Kept:
    """A cache that keeps each layer's keys and values."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, layer: int, input_pos: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.layers.append((keys, values))
        return keys, values


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


@pytest.mark.parametrize("length", [1, 21])
@pytest.mark.parametrize("fields", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fixed", [False, True])
def test_keys_and_values(
    tiny_config: Build, fields: dict[str, Any], length: int, stored: torch.dtype, fixed: bool
) -> None:
    if fixed and not has_fixed_products():
        pytest.skip("no products by 16-bit integers here")
    torch.manual_seed(0)
    transformer = Transformer(dataclasses.replace(tiny_config().transformer, **fields)).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    transformer.to(stored)
    tokens = torch.randint(0, transformer.config.vocab_size, (2, length))
    with torch.inference_mode():
        found = list(context_keys_values(transformer, tokens, fixed))
        kept = Kept()
        transformer.float().backbone(transformer.embed(tokens), torch.arange(length), kept)
    assert len(found) == len(kept.layers) == transformer.config.num_layers
    for ours, theirs in zip(found, kept.layers, strict=True):
        for mine, own in zip(ours, theirs, strict=True):
            assert mine.shape == own.shape
            assert mine.dtype == torch.float32
            if fixed:
                assert (mine - own).norm() < 1e-3 * own.norm()
            else:
                torch.testing.assert_close(mine, own, atol=1e-5, rtol=1e-4)
