"""Sampling: frequencies against chosen logits, top-k, temperature, seeds; alone and inside of a rollout."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt.rollout import rollout
from ivideogpt.rollout.sampling import (
    Sampling,
    check_sampling,
    copy_generator,
    draw_uniforms,
    generator_states,
    sample_token,
    set_generator_states,
)

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0, -3.0])
DRAWS = 20_000
CPU = torch.device("cpu")
Check = Callable[[Tensor, Tensor], None]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniforms(count: int = DRAWS, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=seeded(seed))


def cut(logits: Tensor, top_k: int) -> Tensor:
    """All but the ``top_k`` largest of the logits (V,) at minus infinity."""
    return torch.where(logits.argsort(descending=True).argsort() < top_k, logits, -torch.inf)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [None, 2, 4, 100])
def test_frequencies_are_those_of_the_cut_softmax(
    assert_frequencies: Check, temperature: float, top_k: int | None
) -> None:
    tokens = sample_token(LOGITS.expand(DRAWS, -1), uniforms(), Sampling(temperature, top_k))
    assert_frequencies(tokens, (cut(LOGITS, top_k or len(LOGITS)) / temperature).softmax(0))


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, None), (0.0, 100), (1.0, 1)])
def test_argmax_ignores_chance(temperature: float, top_k: int | None) -> None:
    for chance in (torch.zeros(2), torch.full((2,), 0.999)):
        assert sample_token(torch.stack([LOGITS, -LOGITS]), chance, Sampling(temperature, top_k)).tolist() == [0, 5]


def test_the_ends_of_the_unit_interval_fall_on_possible_tokens() -> None:
    almost_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    logits = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]] * 2)
    assert sample_token(logits, torch.stack([torch.tensor(0.0), almost_one]), Sampling(1.0, None)).tolist() == [1, 2]
    many = torch.randn(500, 4000, generator=seeded()) * 5
    drawn = sample_token(many, almost_one.expand(500), Sampling(1.0, 3))
    threshold = many.topk(3, dim=-1).values[:, -1]
    assert (many.gather(1, drawn[:, None])[:, 0] >= threshold).all()


def test_ties_with_the_last_of_the_top_are_included(assert_frequencies: Check) -> None:
    logits = torch.tensor([0.0, 1.0, 0.0, -1.0])
    tokens = sample_token(logits.expand(DRAWS, -1), uniforms(), Sampling(1.0, 2))
    assert_frequencies(tokens, torch.tensor([0.0, 1.0, 0.0, -torch.inf]).softmax(0))


def test_a_range_of_ids(assert_frequencies: Check) -> None:
    sampling = Sampling(1.0, None, first_id=2, last_id=4)
    tokens = sample_token(LOGITS[2:5].expand(DRAWS, -1), uniforms(), sampling)
    allowed = torch.full_like(LOGITS, -torch.inf)
    allowed[2:5] = LOGITS[2:5]
    assert_frequencies(tokens, allowed.softmax(0))
    assert sample_token(LOGITS[2:5], torch.tensor(0.5), Sampling(0.0, None, 2, 4)) == 3


def test_any_shape_in_front() -> None:
    logits = torch.randn(3, 4, 9, generator=seeded(1))
    chance = torch.rand(3, 4, generator=seeded(2))
    flat = sample_token(logits.flatten(0, 1), chance.flatten(), Sampling(1.0, 5))
    assert torch.equal(sample_token(logits, chance, Sampling(1.0, 5)).flatten(), flat)


def test_low_precision_logits_are_sampled_in_float32(assert_frequencies: Check) -> None:
    tokens = sample_token(LOGITS.bfloat16().expand(DRAWS, -1), uniforms(), Sampling(1.0, None))
    assert_frequencies(tokens, LOGITS.softmax(0))


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        check_sampling(temperature, None)


@pytest.mark.parametrize("top_k", [0, -3, 2.5, True])
def test_bad_top_k(top_k: Any) -> None:
    with pytest.raises(ValueError, match="top_k"):
        Sampling(1.0, top_k)


def test_a_copied_generator_goes_its_own_way() -> None:
    generator = seeded(3)
    copy = copy_generator(generator, CPU)
    assert isinstance(copy, torch.Generator)
    expected = torch.rand(4, generator=seeded(3))
    assert torch.equal(torch.rand(4, generator=copy), expected)
    assert torch.equal(torch.rand(4, generator=generator), expected)


def test_without_a_generator_the_global_seed_governs() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(draw_uniforms(copy_generator(None, CPU), 1, 3, CPU))
    assert torch.equal(*draws)


def test_one_stream_a_row() -> None:
    together = draw_uniforms([seeded(1), seeded(2)], 2, 5, CPU)
    assert torch.equal(together[1], torch.rand(5, generator=seeded(2)))
    copies = copy_generator([seeded(1), seeded(2)], CPU, 2)
    assert isinstance(copies, list)
    states = generator_states(copies)
    assert torch.equal(draw_uniforms(copies, 2, 5, CPU), together)
    set_generator_states(copies, states)
    assert torch.equal(draw_uniforms(copies, 2, 5, CPU), together)
    with pytest.raises(ValueError, match="one for each of the 3 rows, got 2"):
        copy_generator([seeded(1), seeded(2)], CPU, 3)


def test_a_generator_on_the_cpu_serves_any_device() -> None:
    elsewhere = torch.device("meta")
    for given in (seeded(1), [seeded(1), seeded(2)]):
        copied = copy_generator(given, elsewhere, 2)
        assert draw_uniforms(copied, 2, 5, elsewhere).device == elsewhere
        states = generator_states(copied)  # five numbers further, in the CPU's own way
        alone = copy_generator(given, CPU, 2)
        draw_uniforms(alone, 2, 5, CPU)
        assert all(torch.equal(*pair) for pair in zip(states, generator_states(alone), strict=True))


def frames_of(world_model: Any, transformer: Any, **settings: Any) -> Tensor:
    """Sampled ids (R, F, n + 1) of a rollout of 20 frames by another transformer."""
    layout = world_model.layout
    out = rollout(world_model.tokenizer, transformer, None, torch.rand(2, 2, 3, 32, 32), horizon=20, **settings)
    return out.tokens[:, layout.context_span :].unflatten(1, (-1, layout.frame_stride))


def test_a_rollout_samples_what_the_model_says(
    tiny_world_model: Callable[..., Any], chosen_logits: Callable[..., Any], assert_frequencies: Check
) -> None:
    layout = tiny_world_model().layout
    logits = torch.linspace(-2, 2, layout.vocab_size)
    settings: dict[str, Any] = {"num_samples": 8, "temperature": 0.7, "top_k": 10, "generator": seeded()}
    frames = frames_of(tiny_world_model(), chosen_logits(logits), **settings)
    assert frames.shape == (16, 20, 5)
    assert (frames[:, :, 0] == layout.dynamics_slot_id).all()
    assert_frequencies(frames[:, :, 1:], (cut(logits, 10) / 0.7).softmax(0))


def test_only_dynamics_ids(
    tiny_world_model: Callable[..., Any], chosen_logits: Callable[..., Any], assert_frequencies: Check
) -> None:
    layout = tiny_world_model().layout
    logits = torch.linspace(2, -2, layout.vocab_size)  # the likeliest are context ids
    frames = frames_of(
        tiny_world_model(), chosen_logits(logits), num_samples=8, dynamics_ids_only=True, generator=seeded()
    )
    allowed = torch.full_like(logits, -torch.inf)
    allowed[layout.codebook_size : layout.context_slot_id] = logits[layout.codebook_size : layout.context_slot_id]
    assert_frequencies(frames[:, :, 1:], allowed.softmax(0))


def test_unforced_slots_are_sampled_too(
    tiny_world_model: Callable[..., Any], chosen_logits: Callable[..., Any]
) -> None:
    layout = tiny_world_model().layout
    logits = torch.full((layout.vocab_size,), -1e4)
    logits[40] = 0.0
    frames = frames_of(tiny_world_model(), chosen_logits(logits), force_slots=False, temperature=0)
    assert (frames[:, 0, 0] == layout.dynamics_slot_id).all()  # part of the prompt
    assert (frames[:, 1:, 0] == 40).all()
    assert (frames[:, :, 1:] == 40).all()
