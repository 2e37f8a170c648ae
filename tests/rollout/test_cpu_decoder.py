"""The compiled CPU decoder: the transformer's own results, in every shape and precision."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivideogpt.config import TransformerConfig
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.cpu import KernelDecoder, load_kernel, packing, supported, why_unavailable
from ivideogpt.rollout.cpu.decoder import KernelBranch
from ivideogpt.rollout.decoder import Branch, Decoder
from ivideogpt.rollout.sampling import Sampling

ACTION_DIM = 3
CONTEXT = 37
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2, "int8": 4e-2}
"""Relative error of hidden states, as norms, on random weights of the same size as the activations'."""

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one-kv-head": {"num_kv_heads": 1, "head_dim": 64, "rope_base": 500.0},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd": {"embed_dim": 48, "num_heads": 3, "mlp_dim": 80, "vocab_size": 101, "head_dim": 32, "mlp_bias": True},
    "wide": {"embed_dim": 176, "mlp_dim": 264, "num_heads": 2, "head_dim": 48, "norm_eps": 1e-2},
}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module", autouse=True)
def _kernel() -> None:
    if load_kernel() is None:
        pytest.skip(f"no compiled kernel: {why_unavailable()}")


def transformer(seed: int = 0, **fields: Any) -> Transformer:
    defaults: dict[str, Any] = dict(
        vocab_size=200, num_layers=3, num_heads=4, embed_dim=64, mlp_dim=96, max_positions=256, action_dim=ACTION_DIM
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transformer(TransformerConfig(**{**defaults, **fields})).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def ids(model: Transformer, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def uncached(model: Transformer, tokens: Tensor, action_at: int, actions: Tensor) -> Tensor:
    """Final hidden states of whole sequences, each with an action at one position."""
    embeddings = model.embed(tokens).clone()
    embeddings[:, action_at] += model.embed_actions(actions)
    return model.backbone(embeddings)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def started(
    model: Transformer, precision: str = "float32", clips: int = 2, samples: int = 3, capacity: int = 64
) -> tuple[KernelDecoder, KernelBranch]:
    decoder = KernelDecoder(model, precision)
    return decoder, decoder.branch(decoder.prefill(ids(model, clips, CONTEXT)), samples, capacity)


def test_it_is_a_decoder() -> None:
    model = transformer()
    decoder, branch = started(model)
    seams: tuple[Decoder, Branch] = (decoder, branch)  # mypy checks the protocols
    assert seams[0].bytes_per_step >= 4 * sum(p.numel() for name, p in layers_and_head(model))
    assert seams[1].rows == 6
    assert seams[1].capacity == 64
    assert started(transformer(), "int8")[0].bytes_per_step < seams[0].bytes_per_step / 3


def layers_and_head(model: Transformer) -> list[tuple[str, Tensor]]:
    parameters = model.named_parameters()
    return [(name, p) for name, p in parameters if name.endswith("_proj.weight") or name.startswith("lm_head")]


@pytest.mark.parametrize(("clips", "samples"), [(1, 1), (1, 17), (2, 1), (2, 5), (3, 2), (1, 130)])
@pytest.mark.parametrize("length", [1, 2, 17])
@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_and_logits_are_the_modules(name: str, clips: int, samples: int, length: int) -> None:
    model = transformer(**CONFIGS[name])
    context, own = ids(model, clips, CONTEXT), ids(model, clips * samples, 19 + length, seed=1)
    actions = numbers(clips * samples, ACTION_DIM)
    whole = torch.cat([context.repeat_interleave(samples, 0), own], dim=1)
    expected = uncached(model, whole, whole.shape[1] - 1, actions)[:, CONTEXT:]
    decoder = KernelDecoder(model)
    branch = decoder.branch(decoder.prefill(context), samples, 19 + length)
    parts = [decoder.feed(branch, own[:, :1]), decoder.feed(branch, own[:, 1:19])]
    found = torch.cat([*parts, decoder.feed(branch, own[:, 19:], actions)], dim=1)
    assert branch.length == 19 + length
    assert error(found, expected) < TOLERANCE["float32"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    logits = decoder.logits(found, Sampling())
    torch.testing.assert_close(logits, model.lm_head(expected), atol=1e-4, rtol=1e-4)
    some = decoder.logits(found[:, -1], Sampling(first_id=37, last_id=70))
    torch.testing.assert_close(some, model.lm_head(expected)[:, -1, 37:71], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("positions", [1, 15, 16, 17, 100])
def test_head_sizes_and_prefix_lengths(head_dim: int, positions: int) -> None:
    model = transformer(head_dim=head_dim, num_heads=2)
    tokens = ids(model, 2, positions + 35)
    decoder = KernelDecoder(model)
    branch = decoder.branch(decoder.prefill(tokens[:, :positions]), 1, 35)
    found = torch.cat([decoder.feed(branch, tokens[:, i : i + 1]) for i in range(positions, positions + 35)], dim=1)
    torch.testing.assert_close(found, model.backbone(model.embed(tokens))[:, positions:], atol=1e-4, rtol=1e-4)


def test_the_action_is_added_where_it_is_told() -> None:
    model = transformer()
    tokens, actions = ids(model, 6, CONTEXT + 5), numbers(6, ACTION_DIM)
    decoder = KernelDecoder(model)
    prefix = decoder.prefill(tokens[:, :CONTEXT])
    for at, place in ((-1, 4), (-2, 3), (0, 0), (3, 3)):
        found = decoder.feed(decoder.branch(prefix, 1, 5), tokens[:, CONTEXT:], actions, at)
        expected = uncached(model, tokens, CONTEXT + place, actions)[:, CONTEXT:]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_more_positions_at_once_than_fit_a_panel() -> None:
    model = transformer(num_kv_heads=2)
    tokens = ids(model, 2, CONTEXT + 200)
    decoder = KernelDecoder(model)
    branch = decoder.branch(decoder.prefill(tokens[:, :CONTEXT]), 1, 200)
    expected = model.backbone(model.embed(tokens))[:, CONTEXT:]
    torch.testing.assert_close(decoder.feed(branch, tokens[:, CONTEXT:]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("samples", [1, 3, 30])
def test_other_precisions_are_close(precision: str, name: str, samples: int) -> None:
    model = transformer(**CONFIGS[name])
    if (reason := supported(model, precision)) is not None:
        pytest.skip(reason)
    found, expected = (
        decoder.feed(branch, ids(model, 2 * samples, 5))
        for decoder, branch in (started(model, kind, samples=samples) for kind in (precision, "float32"))
    )
    assert error(found, expected) < TOLERANCE[precision]


def test_float16_is_closer_than_bfloat16() -> None:
    model = transformer()
    exact, *rest = (decoder.feed(branch, ids(model, 6, 5)) for decoder, branch in (
        started(model, kind) for kind in ("float32", "float16", "bfloat16")
    ))  # fmt: skip
    assert error(rest[0], exact) < error(rest[1], exact) / 4


def test_int8_has_scales_for_each_group() -> None:
    model = transformer(embed_dim=176, head_dim=16)
    model.lm_head.weight[:, : packing.GROUP] *= 1000
    hidden = numbers(5, 176) - 0.5
    hidden[:, : packing.GROUP] = 0  # then the large weights must not cost the precision of the others
    found, expected = (KernelDecoder(model, kind).logits(hidden, Sampling()) for kind in ("int8", "float32"))
    assert error(found, expected) < 1e-2


def test_bfloat16_modules() -> None:
    half = transformer().to(torch.bfloat16)
    decoder, branch = started(half.float())
    expected = decoder.feed(branch, ids(half, 6, 5), numbers(6, ACTION_DIM))
    half = transformer().to(torch.bfloat16)
    for precision in ("float32", "bfloat16", "int8"):
        decoder, branch = started(half, precision)
        found = decoder.feed(branch, ids(half, 6, 5), numbers(6, ACTION_DIM))
        assert found.dtype == torch.float32
        assert error(found, expected) < 0.1  # the prefix is computed in bfloat16


def test_fork_and_rewind() -> None:
    model = transformer(num_kv_heads=2)
    for precision in ("float32", "bfloat16"):
        decoder, branch = started(model, precision)
        first, second, third = (ids(model, 6, count, seed=count) for count in (20, 3, 7))
        decoder.feed(branch, first)
        expected = decoder.feed(branch, second)
        branch.length = 20
        fork = branch.fork()
        assert fork.length == 20
        assert fork.prefix is branch.prefix
        other = decoder.feed(branch, third)  # what one writes, the other does not see
        torch.testing.assert_close(decoder.feed(fork, second), expected, atol=0, rtol=0)
        branch.length = 20
        torch.testing.assert_close(decoder.feed(branch, third), other, atol=0, rtol=0)
        branch.length = 0
        torch.testing.assert_close(decoder.feed(branch, first[:, :1]), decoder.feed(started(model, precision)[1],
                                   first[:, :1]), atol=0, rtol=0)  # fmt: skip


@pytest.mark.parametrize("name", ["oxe-64-act-free", "bair-64-act-cond"])
def test_greedy_frames_of_the_golden_checkpoints(golden: Callable[[str], Any], name: str) -> None:
    import ivideogpt

    recorded = golden(name)
    model = ivideogpt.from_pretrained(recorded.folder)
    layout, expected = model.layout, recorded.tensors["greedy_tokens"]
    n, span = layout.dynamics_tokens_per_frame, layout.context_span
    horizon = layout.num_frames(expected.shape[1]) - model.config.context_length
    actions = recorded.tensors.get("actions")
    slot_actions = layout.slot_actions(actions, horizon) if actions is not None else None
    decoder = KernelDecoder(model.transformer)
    branch = decoder.branch(decoder.prefill(expected[:, :span]), 1, horizon * (n + 1))
    parts, lead = [expected[:, :span]], expected[:, span : span + 1]
    for frame in range(horizon):
        given = slot_actions[:, frame] if slot_actions is not None else None
        sampled = decoder.sample(branch, lead, given, torch.zeros(len(expected), n), Sampling(0.0))
        parts += [lead[:, -1:], sampled.tokens]
        lead = torch.cat([sampled.tokens[:, -1:], torch.full((len(expected), 1), layout.dynamics_slot_id)], dim=1)
    assert torch.equal(torch.cat(parts, dim=1), expected)
    slots = (slot_actions, layout.slot_positions(horizon)) if slot_actions is not None else ()
    logits = model.transformer(expected, *slots).logits[:, -2]
    branch.length -= 1
    found = decoder.logits(decoder.feed(branch, expected[:, -2:-1])[:, -1], Sampling())
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    model, before = transformer(), torch.get_num_threads()
    lead, uniforms, actions = ids(model, 6, 2), numbers(6, 9), numbers(6, ACTION_DIM)
    decoder, branch = started(model)
    expected = decoder.sample(branch, lead, actions, uniforms, Sampling())
    branch.length = 0
    try:
        torch.set_num_threads(threads)
        found = decoder.sample(branch, lead, actions, uniforms, Sampling())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.hidden, expected.hidden)


def test_two_threads_at_once_give_what_one_gives() -> None:
    model = transformer()
    decoder, first = started(model)
    branches = [first, *(decoder.branch(first.prefix, 3, 64) for _ in range(3))]
    leads = [ids(model, 6, 2, seed=seed) for seed in range(4)]
    found: dict[int, list[Tensor]] = {}

    def run(index: int) -> list[Tensor]:
        frames = []
        with torch.inference_mode():
            for _ in range(5):
                branches[index].length = 0
                frames.append(decoder.sample(branches[index], leads[index], None, numbers(6, 20), Sampling()).tokens)
        return frames

    expected = [run(index) for index in range(4)]
    threads = [threading.Thread(target=lambda i=i: found.update({i: run(i)})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert all(torch.equal(a, b) for a, b in zip(found[index], expected[index], strict=True))


def test_the_weights_are_copies() -> None:
    model = transformer()
    decoder, branch = started(model)
    expected = decoder.feed(branch, ids(model, 6, 2), numbers(6, ACTION_DIM))
    for name, parameter in model.named_parameters():
        if name != "embed_tokens.weight":  # which the prefix has read already
            parameter.zero_()
    branch.length = 0
    assert torch.equal(decoder.feed(branch, ids(model, 6, 2), numbers(6, ACTION_DIM)), expected)


def test_bad_calls_are_refused() -> None:
    model = transformer(action_dim=None)
    decoder, branch = started(model, capacity=5)
    with pytest.raises(AssertionError, match="full"):
        decoder.feed(branch, ids(model, 6, 6))
    with pytest.raises(AssertionError, match="full"):
        decoder.sample(branch, ids(model, 6, 2), None, numbers(6, 5), Sampling())
    for bad in (-1, 200):
        with pytest.raises(AssertionError, match=r"\[0, 200\)"):
            decoder.feed(branch, torch.full((6, 1), bad))
    with pytest.raises(AssertionError):
        decoder.feed(branch, ids(model, 5, 1))
    with pytest.raises(AssertionError):
        decoder.feed(branch, ids(model, 6, 1).int())
    with pytest.raises(AssertionError, match="no action layer"):
        decoder.feed(branch, ids(model, 6, 1), numbers(6, 3))
    with pytest.raises(AssertionError, match="ids 0 to 200 of 200"):
        decoder.logits(numbers(6, 64), Sampling(last_id=200))
    assert branch.length == 0


def test_what_is_not_supported() -> None:
    assert supported(transformer()) is None
    assert "multiple of 16, got 24" in str(supported(transformer(head_dim=24)))
    assert "float16" in str(supported(transformer().half()))
    assert "int4" in str(supported(transformer(), "int4"))
    assert "not on the CPU" in str(supported(transformer().to("meta")))
    strange: Any = transformer()
    strange.layers[1].mlp.up_proj = nn.Sequential(strange.layers[1].mlp.up_proj)
    assert "layers.1.mlp.up_proj is a Sequential" in str(supported(strange))
    hooked = transformer()
    hooked.norm.register_forward_hook(lambda *_: None)
    assert "norm has hooks" in str(supported(hooked))
    mixed = transformer()
    mixed.norm.to(torch.bfloat16)
    assert "all float32 or all bfloat16" in str(supported(mixed))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "int8"])
def test_weights_that_are_not_numbers_stay_so(precision: str) -> None:
    if (reason := supported(transformer(), precision)) is not None:
        pytest.skip(reason)
    for bad in (float("nan"), float("inf")):
        model = transformer(embed_dim=176, head_dim=16)
        model.lm_head.weight[7, 3] = bad
        logits = KernelDecoder(model, precision).logits(numbers(2, 176), Sampling())
        assert not logits[:, 7].isfinite().any()
        assert logits[:, 8:].isfinite().all()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_packed_weights_are_the_rounded_ones(precision: str) -> None:
    library = load_kernel()
    assert library is not None
    if precision == "float16" and not library.ivideogpt_has_float16():
        pytest.skip("no float16 here")
    dtype, weight = getattr(torch, precision), numbers(70, 150) * 2 - 1
    out = torch.empty(packing.packed_bytes(70, 150, precision), dtype=torch.uint8)
    packing.pack(library, weight, precision, out)
    stored = out.view(dtype).float().view(3, 150, 32)
    if precision == "bfloat16":  # outputs i and i + 16 share a lane
        stored = stored.view(3, 150, 16, 2).transpose(2, 3).flatten(2)
    stored = stored.transpose(1, 2).flatten(0, 1)
    assert torch.equal(stored[:70], weight.to(dtype).float())
    assert not stored[70:].any()
