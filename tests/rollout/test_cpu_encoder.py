"""Frames get the tokenizer's own indices from its encoders in tiled convolutions."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivideogpt.models import CompressiveTokenizer
from ivideogpt.rollout.cpu import encoder as encoder_module
from ivideogpt.rollout.cpu import why_unavailable
from ivideogpt.rollout.cpu.encoder import TiledEncoder, tiled_encoder_for, tiled_tokenizer_for
from ivideogpt.rollout.cpu.winograd import TiledConvolution
from ivideogpt.rollout.pixels import encode_context

Build = Callable[..., Any]

needs_kernels = pytest.mark.skipif(why_unavailable() is not None, reason=f"no compiled kernels: {why_unavailable()}")


@pytest.fixture
def tokenizer_of(tiny_config: Build) -> Build:
    """``tokenizer_of(...)`` gives a random tokenizer whose codebook has entries for what its encoder gives."""

    def build(**fields: Any) -> CompressiveTokenizer:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tokenizer = CompressiveTokenizer(tiny_config(**{"block_channels": (16, 32, 32), **fields}).tokenizer)
            for name, parameter in tokenizer.encoder.named_parameters():
                if parameter.dim() == 1:
                    nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
            video = clips_for(tokenizer, 2, frames=9, seed=1)
            context, future = video.split([tokenizer.context_length, 9 - tokenizer.context_length], 1)
            with torch.no_grad():
                latents, features = tokenizer._context_latents(context)
                dynamics = tokenizer._dynamics_latents(future, features)
                for codebook, found in ((tokenizer.quantize, latents), (tokenizer.dynamics_quantize, dynamics)):
                    entries, weight = found.flatten(0, 2), codebook.embedding.weight
                    weight[: len(entries)] = entries[torch.randperm(len(entries))[: len(weight)]]
        return tokenizer.eval()

    return build


def frames_for(tokenizer: CompressiveTokenizer, count: int, seed: int = 1) -> Tensor:
    config = tokenizer.config
    shape = (count, config.in_channels, config.resolution, config.resolution)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def clips_for(tokenizer: CompressiveTokenizer, count: int, frames: int, seed: int) -> Tensor:
    return frames_for(tokenizer, count * frames, seed).unflatten(0, (count, frames))


@torch.no_grad()
def indices_of(tokenizer: CompressiveTokenizer, frames: Tensor) -> Tensor:
    return tokenizer.quantize.nearest(tokenizer._context_latents(frames[:, None])[0])[:, 0]


SHAPES: list[dict[str, Any]] = [
    dict(),
    dict(layers_per_block=2),
    dict(mid_block_attention=True, block_channels=(32, 64, 32)),
    dict(block_channels=(8, 32, 32)),  # the first level has too few channels for the kernels
    dict(resolution=24, patch_size=2),  # a grid of 6: no multiple of the larger tile
    dict(resolution=20, patch_size=1),  # a grid of 5: no tiles at the end
]


@needs_kernels
@pytest.mark.parametrize("fields", SHAPES, ids=lambda fields: "-".join(fields) or "plain")
def test_indices_are_the_tokenizers(tokenizer_of: Build, fields: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(**fields)
    frames, made = frames_for(tokenizer, 5, seed=2), tiled_encoder_for(tokenizer)
    assert made is not None
    expected = indices_of(tokenizer, frames)
    assert len(expected.unique()) > 4  # indices worth comparing
    assert torch.equal(made.indices(frames), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made.indices(frames), expected)


@pytest.fixture
def however_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles also where they gain nothing."""
    monkeypatch.setattr(encoder_module, "WIDE", 1)


@needs_kernels
@pytest.mark.usefixtures("however_narrow")
@pytest.mark.parametrize("fields", SHAPES, ids=lambda fields: "-".join(fields) or "plain")
def test_clips_get_the_tokenizers_ids(tokenizer_of: Build, fields: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(**fields)
    video, made = clips_for(tokenizer, 2, frames=6, seed=2), tiled_tokenizer_for(tokenizer)
    assert made is not None and not hasattr(made, "decoder")
    assert any(isinstance(part, TiledConvolution) for part in made.cond_encoder.modules())
    with torch.no_grad():
        expected = tokenizer.encode(video)
        assert torch.equal(made.encode(video), expected)
    context, dynamics = tokenizer.layout.split(expected)
    assert len(context.unique()) > 4 and len(dynamics.unique()) > 4  # indices worth comparing
    assert tiled_tokenizer_for(tokenizer) is made
    with torch.no_grad():
        tokenizer.cond_encoder.conv_in.weight.mul_(-1)
        other = tokenizer.encode(video)
        again = tiled_tokenizer_for(tokenizer)
        assert again is not None and again is not made and torch.equal(again.encode(video), other)
    assert all(parameter.requires_grad for parameter in tokenizer.parameters())


@needs_kernels
@pytest.mark.usefixtures("however_narrow")
def test_a_copy_goes_with_the_weights_it_was_made_of(tokenizer_of: Build) -> None:
    with torch.inference_mode():
        tokenizer = copy.deepcopy(tokenizer_of())
    tokenizer.to(memory_format=torch.channels_last)  # no inference tensors any more, and still no count of writes
    video = clips_for(tokenizer, 1, frames=4, seed=2)
    made = tiled_tokenizer_for(tokenizer)
    assert made is not None and tiled_tokenizer_for(tokenizer) is made
    with torch.no_grad():
        assert torch.equal(made.encode(video), tokenizer.encode(video))
    alive = weakref.ref(made)
    del made
    assert alive() is not None
    assert tiled_tokenizer_for(tokenizer.to(torch.bfloat16)) is None
    gc.collect()
    assert alive() is None


@needs_kernels
@torch.no_grad()
def test_latents_are_near(tokenizer_of: Build, monkeypatch: Any) -> None:
    tokenizer = tokenizer_of()
    frames = frames_for(tokenizer, 3)
    seen: list[Tensor] = []
    made = TiledEncoder(tokenizer)

    def nearest(z: Tensor) -> Tensor:
        seen.append(z)
        return torch.zeros(z.shape[:-1])

    monkeypatch.setattr(made._codebook, "nearest", nearest)
    made.indices(frames)
    expected = tokenizer._context_latents(frames[:, None])[0][:, 0]
    torch.testing.assert_close(seen[0], expected, atol=1e-5, rtol=1e-5)


@needs_kernels
@pytest.mark.usefixtures("however_narrow")
@pytest.mark.parametrize("name", ["oxe-64-act-free", "bair-64-act-cond"])
def test_indices_of_the_published_checkpoints(golden: Build, name: str) -> None:
    from ivideogpt import from_pretrained

    recorded = golden(name)
    tokenizer = from_pretrained(recorded.folder).tokenizer
    made = tiled_encoder_for(tokenizer)
    assert made is not None
    frames = recorded.video.flatten(0, 1)  # predicted frames too: each may become context
    assert torch.equal(made.indices(frames), indices_of(tokenizer, frames))
    whole = tiled_tokenizer_for(tokenizer)
    assert whole is not None
    with torch.no_grad():
        assert torch.equal(whole.encode(recorded.video), tokenizer.encode(recorded.video))


@needs_kernels
def test_an_encoder_keeps_its_weights_and_another_takes_the_new_ones(tokenizer_of: Build) -> None:
    tokenizer = tokenizer_of()
    frames = frames_for(tokenizer, 4)
    made = tiled_encoder_for(tokenizer)
    assert made is not None and tiled_encoder_for(tokenizer) is made
    before = indices_of(tokenizer, frames)
    with torch.no_grad():
        tokenizer.encoder.conv_in.weight.mul_(-1)
    assert torch.equal(made.indices(frames), before)
    after = tiled_encoder_for(tokenizer)
    assert after is not None and after is not made
    assert torch.equal(after.indices(frames), indices_of(tokenizer, frames))
    assert not torch.equal(after.indices(frames), before)
    assert all(parameter.requires_grad for parameter in tokenizer.parameters())


@needs_kernels
def test_threads_encode_at_once(tokenizer_of: Build) -> None:
    tokenizer = tokenizer_of()
    batches = [frames_for(tokenizer, 2, seed)[None] for seed in range(8)]
    expected = [encode_context(tokenizer, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: encode_context(tokenizer, batch), batches))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_where_the_kernels_cannot_run_the_tokenizer_encodes(tokenizer_of: Build, monkeypatch: Any) -> None:
    tokenizer = tokenizer_of()
    frames = frames_for(tokenizer, 4).unflatten(0, (2, 2))
    expected = indices_of(tokenizer, frames.flatten(0, 1)).unflatten(0, (2, 2))
    half = tokenizer_of().to(torch.bfloat16)
    assert tiled_encoder_for(half) is None
    assert tiled_tokenizer_for(tokenizer) is None  # too narrow
    monkeypatch.setattr(encoder_module, "WIDE", 1)
    assert tiled_tokenizer_for(half) is None
    with torch.no_grad():
        assert torch.equal(encode_context(half, frames), half.encode_context(frames.bfloat16())[0])
    monkeypatch.setattr(encoder_module, "why_unavailable", lambda: "none here")
    assert tiled_encoder_for(tokenizer) is tiled_tokenizer_for(tokenizer) is None
    with torch.no_grad():
        assert torch.equal(encode_context(tokenizer, frames), expected)
