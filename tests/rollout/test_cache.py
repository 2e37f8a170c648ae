"""KVCache: what is stored comes back, forks are independent, and decoding with it equals running without it."""

import pytest
import torch

from ivideogpt.config import TransformerConfig
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.cache import KVCache
from ivideogpt.rollout.engine import decode_step, prefill

LAYERS, BATCH, HEADS, DIM = 2, 3, 2, 4


def fill(cache: KVCache, count: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Updates every layer with ``count`` random positions; returns what was stored in each."""
    generator = torch.Generator().manual_seed(seed)
    stored = []
    for layer in range(cache.num_layers):
        keys, values = (torch.randn(BATCH, HEADS, count, DIM, generator=generator) for _ in range(2))
        cache.update(layer, cache.next_positions(count), keys, values)
        stored.append((keys, values))
    return stored


def test_update_returns_all_positions_so_far() -> None:
    cache = KVCache(LAYERS, capacity=8)
    first = fill(cache, 3)
    assert cache.length == 3
    assert cache.next_positions(2).tolist() == [3, 4]
    for layer in range(LAYERS):
        keys, values = torch.randn(2, BATCH, HEADS, 1, DIM)
        all_keys, all_values = cache.update(layer, cache.next_positions(1), keys, values)
        assert torch.equal(all_keys, torch.cat([first[layer][0], keys], dim=2))
        assert torch.equal(all_values, torch.cat([first[layer][1], values], dim=2))
    assert cache.length == 4


def test_a_shorter_length_rewinds() -> None:
    cache = KVCache(1, capacity=4)
    keys = fill(cache, 4)[0][0]
    cache.length = 2
    new = torch.zeros(BATCH, HEADS, 1, DIM)
    all_keys, _ = cache.update(0, cache.next_positions(1), new, new)
    assert torch.equal(all_keys, torch.cat([keys[:, :, :2], new], dim=2))


@pytest.mark.parametrize("repeats", [1, 2])
def test_forks_are_independent(repeats: int) -> None:
    cache = KVCache(LAYERS, capacity=6)
    stored = fill(cache, 3)
    fork = cache.fork(repeats)
    fill(cache, 2, seed=1)
    assert (cache.length, fork.length) == (5, 3)
    for layer in range(LAYERS):
        keys, values = torch.randn(2, BATCH * repeats, HEADS, 1, DIM)
        all_keys, all_values = fork.update(layer, fork.next_positions(1), keys, values)
        expected = torch.cat([stored[layer][0].repeat_interleave(repeats, dim=0), keys], dim=2)
        assert torch.equal(all_keys, expected)
        assert torch.equal(all_values[:, :, :3], stored[layer][1].repeat_interleave(repeats, dim=0))


def test_a_fork_of_an_empty_cache_is_empty() -> None:
    fork = KVCache(1, capacity=6).fork()
    fill(fork, 2)
    assert fork.length == 2


def test_overflow_is_a_broken_invariant() -> None:
    cache = KVCache(1, capacity=2)
    with pytest.raises(AssertionError, match="3 positions do not fit into a cache of 2"):
        cache.update(0, torch.arange(3), *torch.zeros(2, 1, 1, 3, DIM))


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_cached_logits_equal_uncached_logits(num_kv_heads: int) -> None:
    config = TransformerConfig(
        vocab_size=50, num_layers=3, num_heads=4, num_kv_heads=num_kv_heads, embed_dim=32, mlp_dim=48, max_positions=64
    )
    torch.manual_seed(0)
    model = Transformer(config).eval()
    for parameter in model.parameters():  # larger than fresh weights, so that a mistake shows
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(50, (2, 24))
    with torch.no_grad():
        expected = model(tokens).logits
        cache = KVCache(config.num_layers, capacity=24)
        hidden = [prefill(model, tokens[:, :16], cache)]
        hidden.append(decode_step(model, model.embed(tokens[:, 16:19]), cache))  # several at once, behind a prefix
        hidden += [decode_step(model, model.embed(tokens[:, i : i + 1]), cache) for i in range(19, 24)]
        cached = model.lm_head(torch.cat(hidden, dim=1))
    torch.testing.assert_close(cached, expected, atol=1e-4, rtol=1e-4)


def test_keys_keep_the_dtype_they_come_in() -> None:
    cache = KVCache(1, capacity=2)
    keys = torch.ones(1, 1, 1, 2, dtype=torch.bfloat16)
    all_keys, all_values = cache.update(0, cache.next_positions(1), keys, keys.float())
    assert (all_keys.dtype, all_values.dtype) == (torch.bfloat16, torch.float32)
