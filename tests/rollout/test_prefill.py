"""A context's keys and values on a CPU are the transformer's own."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt.models import Transformer
from ivideogpt.rollout.cpu import prefill

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values(tiny_config: Build, fields: dict[str, Any], length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    transformer = Transformer(dataclasses.replace(tiny_config().transformer, **fields)).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.randint(0, transformer.config.vocab_size, (2, length))
    with torch.inference_mode():
        kept = Kept()
        transformer.backbone(transformer.embed(tokens), torch.arange(length), kept)
        found = list(prefill.context_keys_values(transformer, tokens, dtype))
    assert len(found) == len(kept.layers) == transformer.config.num_layers
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(found, kept.layers, strict=True):
        for mine, own in zip(ours, theirs, strict=True):
            assert mine.shape == own.shape
            assert (mine.float() - own).norm() <= limit * own.norm()


def test_products_of_bfloat16_only_where_little_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("float32", "bfloat16", "float16", "int8")
    half, full = torch.bfloat16, torch.float32
    monkeypatch.setattr(prefill, "has_bfloat16_products", lambda: True)
    assert [prefill.context_dtype(name) for name in names] == [full, half, full, full]
    assert [prefill.pixels_dtype(name) for name in names] == [full, half, full, half]
    monkeypatch.setattr(prefill, "has_bfloat16_products", lambda: False)
    assert {choose(name) for name in names for choose in (prefill.context_dtype, prefill.pixels_dtype)} == {full}
