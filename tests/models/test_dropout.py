"""Attention with dropout on a CPU is torch's, with masks of the right frequency."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ivideogpt.config import TransformerConfig
from ivideogpt.models import Transformer, dropout


def inputs(length: int, key_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    heads = (4, key_heads, key_heads)
    q, k, v = (torch.randn(2, number, length, 8, generator=generator).requires_grad_() for number in heads)
    return q, k, v


def with_gradients(out: Tensor, *parts: Tensor) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return [out, *torch.autograd.grad((out * weight).sum(), parts)]


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 2, dropout.BLOCK, 2 * dropout.BLOCK + 17])
def test_without_a_drop_it_is_torchs(length: int, key_heads: int) -> None:
    q, k, v = inputs(length, key_heads)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=key_heads < 4)
    found = dropout.dropped_attention(q, k, v, 0.0)
    for one, other in zip(with_gradients(found, q, k, v), with_gradients(expected, q, k, v), strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def test_with_a_mask_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    length, share = 2 * dropout.BLOCK + 9, 0.3
    (q, k, v), masks = inputs(length), list[Tensor]()
    plain = dropout.draw

    def draw(shape: torch.Size, level: int) -> Tensor:
        masks.append(plain(shape, level))
        return masks[-1]

    monkeypatch.setattr(dropout, "draw", draw)
    found = dropout.dropped_attention(q, k, v, share)
    kept = torch.cat([F.pad(~mask, (0, length - mask.shape[-1])) for mask in masks], 2)
    assert kept.shape == (2, 4, length, length)
    causal = torch.full((length, length), float("-inf")).triu(1)
    weights = (q @ k.transpose(2, 3) / 8**0.5 + causal).softmax(-1)
    expected = (weights * kept / (1 - round(share * dropout.LEVELS) / dropout.LEVELS)) @ v
    for one, other in zip(with_gradients(found, q, k, v), with_gradients(expected, q, k, v), strict=True):
        torch.testing.assert_close(one, other, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_for_and_each_by_itself(share: float) -> None:
    torch.manual_seed(0)
    shape = torch.Size([999, 1003])  # no multiple of the four draws of a word
    level = round(share * dropout.LEVELS)
    mask = dropout.draw(shape, level)
    assert mask.dtype == torch.bool and mask.shape == shape
    error = (share * (1 - share) / mask.numel()) ** 0.5
    assert abs(mask.double().mean() - share) <= 4.5 * error + 0.5 / dropout.LEVELS
    flat = mask.flatten().double() - share
    for distance in (1, 2, 3, 4, 8):  # draws of one word and of its neighbours know nothing of each other
        assert abs((flat[distance:] * flat[:-distance]).mean()) <= 4.5 * share * (1 - share) / mask.numel() ** 0.5
    assert not torch.equal(mask, dropout.draw(shape, level)) or level == 0
    torch.manual_seed(0)
    assert torch.equal(mask, dropout.draw(shape, level))


def test_a_probability_near_one_drops_nearly_all() -> None:
    q, k, v = inputs(dropout.BLOCK)
    assert dropout.draw(torch.Size([1000, 1000]), dropout.LEVELS - 1).double().mean() > 0.9999
    with torch.no_grad():
        found = dropout.dropped_attention(q, k, torch.ones_like(v), 0.999999)
    assert found.isfinite().all() and (found == 0).double().mean() > 0.9


@pytest.mark.parametrize("autocast", [False, True], ids=["true", "mixed"])
def test_in_bfloat16_it_is_as_exact_as_torchs(autocast: bool) -> None:
    parts = [part.detach() * 4 for part in inputs(dropout.BLOCK + 40)]
    if not autocast:
        parts = [part.bfloat16() for part in parts]
    q, k, v = (part.requires_grad_() for part in parts)
    exact = [part.detach().bfloat16().double().requires_grad_() for part in parts]
    expected = with_gradients(dropout.dropped_attention(exact[0], exact[1], exact[2], 0.0), *exact)
    assert expected[0].dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = dropout.dropped_attention(q, k, v, 0.0)
    assert found.dtype == torch.bfloat16
    for one, other in zip(with_gradients(found, q, k, v), expected, strict=True):
        assert (one.double() - other).norm() < 4e-3 * other.norm()


def test_a_transformer_drops_in_training_alone() -> None:
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=50, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, mlp_dim=48, max_positions=64,
        attention_dropout=0.2,
    )  # fmt: skip
    model, tokens = Transformer(config), torch.randint(50, (2, 40))
    model.eval()
    exact = model(tokens).logits
    assert torch.equal(model(tokens).logits, exact)
    model.train()
    torch.manual_seed(1)
    first = model(tokens).logits
    second = model(tokens).logits
    torch.manual_seed(1)
    assert torch.equal(model(tokens).logits, first)
    assert not torch.equal(first, second) and not torch.equal(first, exact)
    with torch.no_grad():
        mean = torch.stack([model(tokens).logits for _ in range(400)]).mean(0)
    assert (mean - exact).norm() < 0.3 * (first - exact).norm()  # what is dropped is made up for on average
