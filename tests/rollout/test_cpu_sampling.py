"""Frames that the compiled CPU decoder samples in one call: what single steps draw, with the right probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivideogpt.config import TransformerConfig
from ivideogpt.models.transformer import Transformer
from ivideogpt.rollout.cpu import KernelDecoder, load_kernel, why_unavailable
from ivideogpt.rollout.cpu.decoder import KernelBranch
from ivideogpt.rollout.sampling import Sampling, sample_token

ACTION_DIM = 3
CONTEXT = 37


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


def started(
    model: Transformer, clips: int = 2, samples: int = 3, capacity: int = 64
) -> tuple[KernelDecoder, KernelBranch]:
    decoder = KernelDecoder(model)
    return decoder, decoder.branch(decoder.prefill(ids(model, clips, CONTEXT)), samples, capacity)


SAMPLINGS = {
    "all": Sampling(1.0, None),
    "top-5": Sampling(1.0, 5),
    "top-100": Sampling(0.7, 100),
    "greedy": Sampling(0.0, None),
    "top-1": Sampling(1.0, 1),
    "range": Sampling(1.3, 20, first_id=41, last_id=135),
    "greedy-range": Sampling(0.0, None, first_id=41, last_id=42),
    "one-id": Sampling(1.0, None, first_id=63, last_id=63),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize(("clips", "samples", "lead"), [(1, 1, 1), (2, 3, 2), (3, 50, 1)])
def test_a_frame_is_what_single_steps_draw(sampling: Sampling, clips: int, samples: int, lead: int) -> None:
    model = transformer(num_kv_heads=2)
    decoder, branch = started(model, clips=clips, samples=samples)
    rows, count = clips * samples, 9
    decoder.feed(branch, ids(model, rows, 3))
    fork = branch.fork()
    tokens, actions, uniforms = ids(model, rows, lead), numbers(rows, ACTION_DIM), numbers(rows, count)
    sampled = decoder.sample(branch, tokens, actions, uniforms, sampling)
    assert branch.length == 3 + lead + count - 1
    hidden = decoder.feed(fork, tokens, actions)
    torch.testing.assert_close(sampled.hidden, hidden, atol=1e-5, rtol=1e-5)
    drawn: list[Tensor] = []
    for step in range(count):
        logits = decoder.logits(hidden[:, -1], sampling)
        drawn.append(sample_token(logits, uniforms[:, step], sampling))
        if step + 1 < count:
            hidden = decoder.feed(fork, drawn[-1][:, None])
    assert torch.equal(sampled.tokens, torch.stack(drawn, dim=1))
    last = decoder.feed(branch, sampled.tokens[:, -1:])  # the branch holds what the loop fed
    torch.testing.assert_close(last, decoder.feed(fork, drawn[-1][:, None]), atol=1e-5, rtol=1e-5)


def chosen_logits(logits: Tensor) -> Transformer:
    """A transformer whose hidden state is all ones after any token and whose head gives ``logits``."""
    model = transformer(vocab_size=len(logits), num_layers=1)
    model.embed_tokens.weight.fill_(1.0)
    model.action_linear = None
    layer: Any = model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    model.norm.weight.fill_(1.0)
    model.lm_head.weight.zero_()
    model.lm_head.weight[:, 0] = logits
    return model


@pytest.mark.parametrize("top_k", [None, 3])
def test_draws_follow_the_probabilities(top_k: int | None) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, 1.0, -3.0, 0.5])  # the top three are 2, 4 and 5
    decoder, branch = started(chosen_logits(logits), clips=1, samples=400, capacity=100)
    tokens = decoder.sample(
        branch, torch.zeros(400, 1, dtype=torch.int64), None, numbers(400, 50), Sampling(1.0, top_k)
    ).tokens
    kept = logits if top_k is None else torch.where(logits >= 1.0, logits, -torch.inf)
    expected = kept.softmax(0) * tokens.numel()
    counts = torch.bincount(tokens.flatten(), minlength=len(logits)).float()
    assert not counts[expected == 0].any()
    terms = ((counts - expected).square() / expected)[expected > 0]
    assert float(terms.sum()) < (24.3 if top_k is None else 13.8)  # chi-square of 7 and of 2 degrees, p = 0.001


def test_ties_with_the_kth_are_kept() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0])
    decoder, branch = started(chosen_logits(logits), clips=1, samples=300, capacity=8)
    lead, uniforms = torch.zeros(300, 1, dtype=torch.int64), numbers(300, 4)
    sampled = decoder.sample(branch, lead, None, uniforms, Sampling(1.0, 2)).tokens
    assert set(sampled.flatten().tolist()) == {0, 1, 2, 4}
    branch.length = 0
    assert not decoder.sample(branch, lead, None, uniforms, Sampling(0.0, None, first_id=2)).tokens.ne(2).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(1.0, 3), Sampling(1.0, None), Sampling(0.0)])
def test_broken_weights_still_give_ids(bad: float, sampling: Sampling) -> None:
    model = transformer()
    model.lm_head.weight[7] = bad
    decoder, branch = started(model)
    tokens = decoder.sample(branch, ids(model, 6, 1), None, numbers(6, 8), sampling).tokens
    assert ((tokens >= 0) & (tokens < 200)).all()
    model.norm.weight.fill_(float("nan"))
    decoder, branch = started(model)
    assert decoder.feed(branch, ids(model, 6, 2)).isnan().all()


def test_the_smallest_uniform_number_skips_what_has_no_mass() -> None:
    logits = torch.tensor([-torch.inf, -torch.inf, 0.0, 1.0])
    decoder, branch = started(chosen_logits(logits), clips=1, samples=2, capacity=8)
    for top_k in (None, 3):
        branch.length = 0
        zeros = torch.zeros(2, 3)
        assert decoder.sample(branch, zeros[:, :1].long(), None, zeros, Sampling(1.0, top_k)).tokens.eq(2).all()


def test_the_largest_uniform_number_stays_inside() -> None:
    decoder, branch = started(transformer())
    uniforms = torch.full((6, 8), math.nextafter(1.0, 0.0))
    tokens = decoder.sample(branch, torch.zeros(6, 1, dtype=torch.int64), None, uniforms, Sampling(1.0, 4)).tokens
    assert (tokens < 200).all()
