"""The pixel half of a rollout gives the tokenizer's own frames, whatever is shared, tiled, split, or run at once."""

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from ivideogpt.models import CompressiveTokenizer
from ivideogpt.rollout import pixels as pixels_module
from ivideogpt.rollout.cpu import why_unavailable, winograd
from ivideogpt.rollout.pixels import PixelDecoder, encode_context, pixel_decoder_for
from ivideogpt.rollout.weights import weights_key

Build = Callable[..., Any]
TILED = dict(block_channels=(16, 32, 32), latent_channels=16)  # every convolution has channels for the kernels
BFLOAT16_TOLERANCE = 0.1  # absolute, of frames in [0, 1] of random weights; the mean error is bounded by a tenth

needs_kernels = pytest.mark.skipif(why_unavailable() is not None, reason=f"no compiled kernels: {why_unavailable()}")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def close(first: Tensor, second: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(first, second.float(), atol=tolerance, rtol=0)


@pytest.fixture
def tokenizer_of(tiny_config: Build) -> Build:
    """``tokenizer_of(seed=0, ...)`` gives a random tokenizer whose every parameter matters."""

    def build(seed: int = 0, **fields: Any) -> CompressiveTokenizer:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tokenizer = CompressiveTokenizer(tiny_config(**{**TILED, **fields}).tokenizer)
            for name, parameter in tokenizer.named_parameters():
                if parameter.dim() == 1 or "pos_emb" in name:  # norms, biases, positions: not ones and zeros
                    nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
                elif "quantize" in name:
                    nn.init.normal_(parameter)
        return tokenizer.eval()

    return build


def some_indices(tokenizer: CompressiveTokenizer, clips: int, frames: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Context (B, t0, N) and dynamics (B, M, n) indices."""
    config, generator = tokenizer.config, torch.Generator().manual_seed(seed)
    context = (clips, config.context_length, config.context_tokens_per_frame)
    dynamics = (clips, frames, config.dynamics_tokens_per_frame)
    return (
        torch.randint(config.codebook_size, context, generator=generator),
        torch.randint(config.dynamics_codebook_size, dynamics, generator=generator),
    )


@torch.no_grad()
def expected(tokenizer: CompressiveTokenizer, context: Tensor, dynamics: Tensor) -> tuple[Tensor, Tensor]:
    """Context and future frames as the tokenizer decodes them."""
    frames, features = tokenizer.decode_context(context)
    return frames.clamp(0, 1), tokenizer.decode_future(dynamics, features).clamp(0, 1)


def check_equal(tokenizer: CompressiveTokenizer, decoder: PixelDecoder, tolerance: float = 1e-5) -> None:
    context, dynamics = some_indices(tokenizer, clips=2, frames=3)
    context_frames, future_frames = expected(tokenizer, context, dynamics)
    assert context_frames.std() > 0.05 and future_frames.std() > 0.05  # frames worth comparing
    features = decoder.context(context.to(decoder.device))
    frames = decoder.decode(dynamics.to(decoder.device), features)
    assert frames.dtype == features.frames.dtype == torch.float32
    assert not frames.requires_grad
    close(frames.cpu(), future_frames, tolerance)
    assert (frames.cpu() - future_frames).abs().mean() < tolerance / 10
    close(features.frames.cpu(), context_frames, tolerance)


SHAPES: list[dict[str, Any]] = [
    dict(context_length=1),
    dict(context_length=2, layers_per_block=2),
    dict(context_length=3),
    dict(
        max_attention_resolution=16, block_channels=(32, 32, 32)
    ),  # a second cross-attention, after the first doubling
    dict(max_attention_resolution=32, block_channels=(32, 64, 32), mid_block_attention=True),
    dict(block_channels=(8, 32, 32), latent_channels=4),  # the last level has too few channels for the kernels
    dict(resolution=24, patch_size=2, max_attention_resolution=8),  # a grid of 6: no multiple of the larger tile
    dict(resolution=20, patch_size=1),  # a grid of 5: only the doubled maps have tiles
]


@pytest.mark.parametrize("fields", SHAPES, ids=lambda fields: "-".join(fields))
def test_frames_are_the_tokenizers(tokenizer_of: Build, fields: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(**fields)
    check_equal(tokenizer, PixelDecoder(tokenizer))


@pytest.mark.parametrize("fields", SHAPES[:4], ids=lambda fields: "-".join(fields))
def test_frames_without_a_compiler(tokenizer_of: Build, fields: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(pixels_module, "why_unavailable", lambda: "none here")
    tokenizer = tokenizer_of(**fields)
    decoder = PixelDecoder(tokenizer)
    assert not decoder.tiled
    check_equal(tokenizer, decoder)


@pytest.mark.parametrize("name", ["oxe-64-act-free", "bair-64-act-cond"])
@torch.no_grad()
def test_frames_of_the_published_checkpoints(golden: Build, name: str) -> None:
    from ivideogpt import from_pretrained

    recorded = golden(name)
    tokenizer = from_pretrained(recorded.folder).tokenizer
    tokens = recorded.tensors["tokens"]
    context, dynamics = tokenizer.layout.split(tokens)
    decoder = PixelDecoder(tokenizer)
    features = decoder.context(context)
    video = torch.cat([features.frames, decoder.decode(dynamics, features)], dim=1)
    close(video, recorded.tensors["reconstruction"].float().clamp(0, 1), 4e-3)  # recorded as float16
    assert torch.equal(encode_context(tokenizer, recorded.video[:, : tokenizer.context_length]), context)
    close(video, tokenizer.double().detokenize(tokens).clamp(0, 1))  # float32 is as far from it by torch as by ours


def test_samples_share_their_clips_context_and_the_last_frame_is_one_frame(tokenizer_of: Build) -> None:
    tokenizer = tokenizer_of()
    context, dynamics = some_indices(tokenizer, clips=2, frames=6)  # say 3 samples of 2 frames
    decoder = PixelDecoder(tokenizer)
    features = decoder.context(context)
    assert [tuple(k.shape[:1]) for k, _ in features.keys_values] == [(2,)]
    frames = decoder.decode(dynamics, features)
    close(decoder.decode(dynamics[:, 1::2], features), frames[:, 1::2])
    one = features.select(slice(1, 2))
    assert one.keys_values[0][0].data_ptr() == features.keys_values[0][0][1].data_ptr()  # not copied
    close(decoder.decode(dynamics[1:, :1], one), frames[1:, :1])
    close(one.frames, features.frames[1:])
    rows = torch.tensor([1, 0, 1])
    close(decoder.decode(dynamics[rows], features.select(rows)), frames[rows])
    close(features.select(rows).frames, features.frames[rows])
    assert decoder.decode(dynamics[:, :0], features).shape == (2, 0, 3, 32, 32)


def test_context_pixels_are_decoded_when_asked_for(tokenizer_of: Build, monkeypatch: Any) -> None:
    tokenizer = tokenizer_of()
    context, _ = some_indices(tokenizer, clips=1, frames=1)
    calls: list[int] = []
    decode = PixelDecoder.context_frames

    def counted(self: PixelDecoder, last: Tensor) -> Tensor:
        calls.append(len(last))
        return decode(self, last)

    monkeypatch.setattr(PixelDecoder, "context_frames", counted)
    features = PixelDecoder(tokenizer).context(context)
    assert not calls
    assert features.frames is features.frames
    assert len(calls) == 1


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_split_batches_give_the_same(tokenizer_of: Build, monkeypatch: Any, at_once: int) -> None:
    tokenizer = tokenizer_of()
    context, dynamics = some_indices(tokenizer, clips=3, frames=3)
    frames = torch.rand(3, 2, 3, 32, 32)
    decoder = PixelDecoder(tokenizer)
    features = decoder.context(context)
    whole = (features.frames, decoder.decode(dynamics, features))
    with torch.no_grad():
        indices = encode_context(tokenizer, frames)
        monkeypatch.setattr(pixels_module, "DECODE_PIXELS", at_once * 32 * 32)
        assert torch.equal(encode_context(tokenizer, frames), indices)
    features = decoder.context(context)
    close(features.frames, whole[0], 1e-6)
    close(decoder.decode(dynamics, features), whole[1], 1e-6)


@needs_kernels
def test_convolutions_in_turns_give_the_same(tokenizer_of: Build, monkeypatch: Any) -> None:
    tokenizer = tokenizer_of()
    monkeypatch.setattr(winograd, "PRODUCTS_AT_ONCE", 1)
    check_equal(tokenizer, PixelDecoder(tokenizer))


def test_short_memory_splits_the_batch_and_says_so(tokenizer_of: Build, monkeypatch: Any) -> None:
    tokenizer = tokenizer_of()
    context, dynamics = some_indices(tokenizer, clips=2, frames=4)
    decoder = PixelDecoder(tokenizer)
    features = decoder.context(context)
    frames = decoder.decode(dynamics, features)
    run = decoder._run

    def short(indices: Tensor, keys_values: Any) -> Tensor:
        if indices.shape[:2].numel() > 2:
            raise torch.OutOfMemoryError("out of memory")
        return run(indices, keys_values)

    monkeypatch.setattr(decoder, "_run", short)
    with pytest.warns(UserWarning, match="out of memory with 8 frames at once") as caught:
        close(decoder.decode(dynamics, features), frames)
    assert len(caught) == 1


def test_a_frame_that_does_not_fit_is_an_error(tokenizer_of: Build, monkeypatch: Any) -> None:
    def fail(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    tokenizer = tokenizer_of()
    context, dynamics = some_indices(tokenizer, clips=1, frames=1)
    decoder = PixelDecoder(tokenizer)
    features = decoder.context(context)
    monkeypatch.setattr(decoder, "_run", fail)
    with pytest.raises(torch.OutOfMemoryError):
        decoder.decode(dynamics, features)


def test_measured_memory_bounds_the_batch(tokenizer_of: Build, monkeypatch: Any) -> None:
    tokenizer = tokenizer_of()
    context, dynamics = some_indices(tokenizer, clips=1, frames=4)
    decoder = PixelDecoder(tokenizer)
    features, run = decoder.context(context), decoder._run
    sizes: list[int] = []

    def counted(indices: Tensor, keys_values: Any) -> Tensor:
        sizes.append(indices.shape[1])
        return run(indices, keys_values)

    monkeypatch.setattr(decoder, "_run", counted)
    monkeypatch.setattr(pixels_module, "free_memory", lambda device: 0)
    decoder.decode(dynamics, features)
    monkeypatch.setattr(pixels_module, "free_memory", lambda device: None)
    decoder.decode(dynamics, features)
    assert sizes == [1, 1, 1, 1, 4]


def test_threads_decode_at_once(tokenizer_of: Build) -> None:
    tokenizer = tokenizer_of()
    decoder = PixelDecoder(tokenizer)
    contexts, dynamics = some_indices(tokenizer, clips=4, frames=4)
    alone = [decoder.decode(dynamics[[i]], decoder.context(contexts[[i]])) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(lambda i: decoder.decode(dynamics[[i]], decoder.context(contexts[[i]])), i % 4)
            for i in range(24)
        ]
        for i, job in enumerate(jobs):
            close(job.result(), alone[i % 4], 1e-6)


def test_dropout_is_off_and_modes_are_left_alone(tokenizer_of: Build) -> None:
    tokenizer = tokenizer_of(attention_dropout=0.5)
    modes = [module.training for module in tokenizer.train().modules()]
    decoder = PixelDecoder(tokenizer)
    context, dynamics = some_indices(tokenizer, clips=2, frames=3)
    frames = decoder.decode(dynamics, decoder.context(context))
    assert [module.training for module in tokenizer.modules()] == modes
    close(frames, expected(tokenizer.eval(), context, dynamics)[1])
    assert all(parameter.requires_grad for parameter in tokenizer.parameters())


def test_autocast_of_the_caller_does_not_matter(tokenizer_of: Build) -> None:
    tokenizer = tokenizer_of()
    with torch.autocast("cpu", torch.bfloat16):
        decoder = PixelDecoder(tokenizer)
        context, dynamics = some_indices(tokenizer, clips=1, frames=2)
        frames = decoder.decode(dynamics, decoder.context(context))
    close(frames, expected(tokenizer, context, dynamics)[1])


@pytest.mark.parametrize("fields", SHAPES[:4], ids=lambda fields: "-".join(fields))
def test_bfloat16_is_near(tokenizer_of: Build, fields: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(**fields)
    check_equal(tokenizer, PixelDecoder(tokenizer, torch.bfloat16), BFLOAT16_TOLERANCE)
    check_equal(tokenizer, PixelDecoder(tokenizer.to(torch.bfloat16)), BFLOAT16_TOLERANCE)  # float32 again on a CPU


@needs_kernels
@pytest.mark.parametrize("fields", SHAPES[:4], ids=lambda fields: "-".join(fields))
def test_products_of_bfloat16_are_near(tokenizer_of: Build, fields: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(**fields)
    decoder = pixel_decoder_for(tokenizer, products=torch.bfloat16)
    check_equal(tokenizer, decoder, BFLOAT16_TOLERANCE)
    assert pixel_decoder_for(tokenizer, products=torch.bfloat16) is decoder
    context, dynamics = some_indices(tokenizer, clips=1, frames=2)
    frames = decoder.decode(dynamics, decoder.context(context))
    exact = pixel_decoder_for(tokenizer)
    assert (frames - exact.decode(dynamics, exact.context(context))).abs().max() > 1e-6  # other products were used


def test_a_decoder_keeps_its_weights_and_another_takes_the_new_ones(tokenizer_of: Build) -> None:
    tokenizer = tokenizer_of()
    context, dynamics = some_indices(tokenizer, clips=1, frames=2)
    before = expected(tokenizer, context, dynamics)[1]
    decoder = pixel_decoder_for(tokenizer)
    assert pixel_decoder_for(tokenizer) is decoder
    assert pixel_decoder_for(tokenizer, torch.bfloat16) is not decoder
    with torch.no_grad():
        tokenizer.cond_decoder.conv_out.bias.add_(0.3)
    close(decoder.decode(dynamics, decoder.context(context)), before)
    after = pixel_decoder_for(tokenizer)
    assert after is not decoder
    close(after.decode(dynamics, after.context(context)), expected(tokenizer, context, dynamics)[1])
    tokenizer.set_context_length(1)
    assert pixel_decoder_for(tokenizer).config.context_length == 1


def test_key_of_weights() -> None:
    linear = nn.Linear(3, 4)
    module = nn.Sequential(linear, nn.BatchNorm1d(4))
    key = weights_key(module)
    assert key == weights_key(module) and hash(key) == hash(weights_key(module))
    with torch.no_grad():
        linear.weight.mul_(2)
    assert weights_key(module) != key
    key = weights_key(module)
    module(torch.rand(2, 3))  # running statistics
    assert weights_key(module) != key
    key = weights_key(module)
    linear.bias = nn.Parameter(linear.bias.detach().clone())
    assert weights_key(module) != key


def test_weights_made_in_inference_mode(tokenizer_of: Build) -> None:
    with torch.inference_mode():
        tokenizer = tokenizer_of()
        key = weights_key(tokenizer)
    assert weights_key(tokenizer) == key
    check_equal(tokenizer, pixel_decoder_for(tokenizer))
    with torch.inference_mode():
        check_equal(tokenizer, pixel_decoder_for(tokenizer))
        tokenizer.post_quant_linear.bias.mul_(1.5)
        assert weights_key(tokenizer) != key


@pytest.mark.slow
def test_compiled_decoding(tokenizer_of: Build) -> None:
    tokenizer = tokenizer_of()
    check_equal(tokenizer, PixelDecoder(tokenizer, compile=True))


@needs_gpu
@pytest.mark.parametrize("fields", SHAPES[:4], ids=lambda fields: "-".join(fields))
@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_frames_on_a_gpu(
    tokenizer_of: Build, fields: dict[str, Any], dtype: torch.dtype | None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    tokenizer = tokenizer_of(**fields)
    on_gpu = PixelDecoder(tokenizer_of(**fields).to("cuda"), dtype)
    for _ in range(4):  # op by op, captured, replayed twice
        check_equal(tokenizer, on_gpu, 1e-5 if dtype else BFLOAT16_TOLERANCE)
    assert on_gpu._graphs and all(on_gpu._graphs.values())


@needs_gpu
def test_threads_share_a_graph(tokenizer_of: Build) -> None:
    tokenizer = tokenizer_of().to("cuda")
    decoder = PixelDecoder(tokenizer)
    contexts, dynamics = (indices.to("cuda") for indices in some_indices(tokenizer, clips=4, frames=4))
    features = [decoder.context(contexts[[i]]) for i in range(4)]
    alone = [decoder.decode(dynamics[[i]], features[i]) for i in range(4)]

    def decode(i: int) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            frames = decoder.decode(dynamics[[i]], features[i])
            torch.cuda.current_stream().synchronize()
        return frames

    with ThreadPoolExecutor(4) as pool:
        for i, frames in enumerate(pool.map(decode, [i % 4 for i in range(24)])):
            close(frames, alone[i % 4], 1e-2)


@needs_gpu
def test_a_capture_that_fails_is_said_once(tokenizer_of: Build, monkeypatch: Any) -> None:
    tokenizer = tokenizer_of().to("cuda")
    decoder = PixelDecoder(tokenizer)
    context, dynamics = (indices.to("cuda") for indices in some_indices(tokenizer, clips=1, frames=1))
    features = decoder.context(context)
    frames = decoder.decode(dynamics, features)

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.warns(UserWarning, match="could not be captured"):
        close(decoder.decode(dynamics, features), frames)
    close(decoder.decode(dynamics, features), frames)


def test_a_decoder_goes_with_its_last_user(tokenizer_of: Build) -> None:
    gc.disable()
    try:
        decoder = PixelDecoder(tokenizer_of(), torch.bfloat16)
        gone = ref(decoder)
        del decoder
        assert gone() is None
    finally:
        gc.enable()
