"""Sampling: frequencies against chosen logits, top-k, temperature, seeds; alone and inside of a rollout."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ivideogpt.rollout import rollout, sample_token
from ivideogpt.rollout.cache import KVCache
from ivideogpt.rollout.sampling import check_sampling, copy_generator

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0, -3.0])
DRAWS = 20_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts(tokens: Tensor, size: int = len(LOGITS)) -> Tensor:
    return torch.bincount(tokens.flatten(), minlength=size)


def cut(logits: Tensor, top_k: int) -> Tensor:
    """All but the ``top_k`` largest of the logits (V,) at minus infinity."""
    return torch.where(logits.argsort(descending=True).argsort() < top_k, logits, -torch.inf)


def assert_frequencies(tokens: Tensor, probabilities: Tensor) -> None:
    """Chi-square test at 0.1 %: with a fixed seed it either always passes or always fails."""
    found = counts(tokens, len(probabilities))
    possible = probabilities > 0
    assert found[~possible].sum() == 0
    expected = probabilities[possible].double()
    expected *= tokens.numel() / expected.sum()
    statistic = ((found[possible] - expected).square() / expected).sum()
    freedom = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
    assert torch.special.gammaincc(freedom / 2, statistic / 2) > 1e-3  # the probability of at least this statistic


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 2, 4, 100])
def test_frequencies_are_those_of_the_cut_softmax(temperature: float, top_k: int | None) -> None:
    tokens = sample_token(LOGITS.expand(DRAWS, -1), temperature, top_k, seeded())
    assert_frequencies(tokens, (cut(LOGITS, top_k or len(LOGITS)) / temperature).softmax(0))


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, None), (0.0, 100), (1.0, 1)])
def test_argmax_draws_nothing(temperature: float, top_k: int | None) -> None:
    generator = seeded()
    state = generator.get_state()
    tokens = sample_token(torch.stack([LOGITS, -LOGITS]), temperature, top_k, generator)
    assert tokens.tolist() == [0, 5]
    assert torch.equal(generator.get_state(), state)


def test_rows_have_their_own_logits_and_draws() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [-torch.inf, 0.0, 0.0]]).expand(DRAWS // 2, 2, 3)
    first, second = sample_token(logits.reshape(-1, 3), 1.0, None, seeded()).view(-1, 2).unbind(1)
    assert_frequencies(first, torch.tensor([0.5, 0.0, 0.5]))
    assert_frequencies(second, torch.tensor([0.0, 0.5, 0.5]))
    agreement = ((first == 2) == (second == 2)).double().mean()
    assert abs(float(agreement) - 0.5) < 0.02


def test_the_same_seed_gives_the_same_tokens() -> None:
    logits = torch.randn(64, 300, generator=seeded(1))
    first, second = (sample_token(logits, 1.0, 100, seeded(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, sample_token(logits, 1.0, 100, seeded(8)))


def test_low_precision_logits_are_sampled_in_float32() -> None:
    tokens = sample_token(LOGITS.bfloat16().expand(DRAWS, -1), 1.0, None, seeded())
    assert_frequencies(tokens, LOGITS.softmax(0))


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        check_sampling(temperature, None)


@pytest.mark.parametrize("top_k", [0, -3, 2.5, True])
def test_bad_top_k(top_k: Any) -> None:
    with pytest.raises(ValueError, match="top_k"):
        check_sampling(1.0, top_k)


def test_a_copied_generator_goes_its_own_way() -> None:
    generator = seeded(3)
    copy = copy_generator(generator, torch.device("cpu"))
    expected = torch.rand(4, generator=seeded(3))
    assert torch.equal(torch.rand(4, generator=copy), expected)
    assert torch.equal(torch.rand(4, generator=generator), expected)


def test_without_a_generator_the_global_seed_governs() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(torch.rand(3, generator=copy_generator(None, torch.device("cpu"))))
    assert torch.equal(*draws)


class ChosenLogits(nn.Module):
    """A transformer whose every position has the same logits, whatever it is fed."""

    def __init__(self, logits: Tensor, max_positions: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_layers=1, action_dim=None, max_positions=max_positions)
        self.lm_head = nn.Linear(1, len(logits), bias=False)
        self.lm_head.weight.data = logits[:, None].clone()
        self.steps: list[int] = []

    def embed(self, tokens: Tensor) -> Tensor:
        return torch.ones(*tokens.shape, 1)

    def backbone(self, embeddings: Tensor, input_pos: Tensor, cache: KVCache) -> Tensor:
        keys = embeddings[:, None]
        assert input_pos.tolist() == list(range(cache.length, cache.length + embeddings.shape[1]))
        cache.update(0, input_pos, keys, keys)
        self.steps.append(embeddings.shape[1])
        return embeddings


def mock_rollout(world_model: Any, logits: Tensor, **settings: Any) -> tuple[Tensor, ChosenLogits]:
    """Sampled ids (R, F, n) of a rollout of 20 frames with chosen logits, and the mock that gave them."""
    layout, transformer = world_model.layout, ChosenLogits(logits, max_positions=256)
    out = rollout(
        world_model.tokenizer, transformer, None, torch.rand(2, 2, 3, 32, 32), horizon=20, **settings  # type: ignore[arg-type]
    )  # fmt: skip
    return out.tokens[:, layout.context_span :].unflatten(1, (-1, layout.frame_stride)), transformer


def test_a_rollout_samples_what_the_model_says(tiny_world_model: Callable[..., Any]) -> None:
    model = tiny_world_model()
    logits = torch.linspace(-2, 2, model.layout.vocab_size)
    frames, transformer = mock_rollout(model, logits, num_samples=8, temperature=0.7, top_k=10, generator=seeded())
    assert frames.shape == (16, 20, 5)
    assert (frames[:, :, 0] == model.layout.dynamics_slot_id).all()
    assert_frequencies(frames[:, :, 1:], (cut(logits, 10) / 0.7).softmax(0))
    # the context once, then one slot and n tokens a frame
    assert transformer.steps == [model.layout.context_span] + [1] * 20 * model.layout.frame_stride


def test_unforced_slots_are_sampled_too(tiny_world_model: Callable[..., Any]) -> None:
    model = tiny_world_model()
    logits = torch.full((model.layout.vocab_size,), -torch.inf)
    logits[40] = 0.0
    frames, _ = mock_rollout(model, logits, force_slots=False, temperature=0)
    assert (frames[:, 0, 0] == model.layout.dynamics_slot_id).all()  # part of the prompt
    assert (frames[:, 1:, 0] == 40).all()
    assert (frames[:, :, 1:] == 40).all()
