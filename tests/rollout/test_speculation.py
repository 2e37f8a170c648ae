"""Speculation: the tokens of plain decoding in fewer passes, exact in distribution, and approximate modes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt.rollout.fused import TorchDecoder
from ivideogpt.rollout.sampling import Sampling
from ivideogpt.rollout.speculation import Speculation, sample_approximate, sample_checked

Build = Callable[..., Any]
ACTION_DIM = 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(batch: int = 2) -> Tensor:
    return torch.rand(batch, 2, 3, 32, 32, generator=seeded())


def some_actions(rows: int = 2) -> Tensor:
    return torch.randn(rows, 8, ACTION_DIM, generator=seeded())


@pytest.mark.parametrize("window", [1, 2, 3, None])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 10}, {"top_k": None}])
@pytest.mark.parametrize("samples", [1, 3])
def test_tokens_are_those_of_plain_decoding(
    tiny_world_model: Build, window: int | None, settings: dict[str, Any], samples: int
) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    plain, checked = (
        model.rollout(
            clip(), some_actions(), horizon=6, num_samples=samples, generator=seeded(3), speculation=speculation,
            **settings,
        )
        for speculation in (None, Speculation(window))
    )  # fmt: skip
    assert torch.equal(plain.tokens, checked.tokens)
    torch.testing.assert_close(plain.rewards, checked.rewards, atol=1e-4, rtol=1e-4)


class Counting:
    """Counts the passes of a decoder."""

    def __init__(self, decoder: TorchDecoder) -> None:
        self.decoder, self.fed = decoder, []  # type: ignore[var-annotated]

    def feed(self, branch: Any, tokens: Tensor, actions: Tensor | None = None, action_at: int = -1) -> Tensor:
        self.fed.append(tokens.shape[1])
        return self.decoder.feed(branch, tokens, actions, action_at)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)


@torch.inference_mode()
def test_a_right_guess_takes_one_pass(tiny_world_model: Build) -> None:
    model = tiny_world_model()
    decoder = Counting(TorchDecoder(model.transformer, "float32"))
    layout, sampling, chance = model.layout, Sampling(1.0, 10), torch.rand(2, 4, generator=seeded())
    context = layout.prompt(model.tokenizer.encode_context(clip())[0])[:, :-1]
    prefix, lead = decoder.prefill(context), torch.full((2, 1), layout.dynamics_slot_id)
    branch = decoder.branch(prefix, 1, 20)
    plain = decoder.sample(branch, lead, None, chance, sampling)
    for window, fed in [(None, [4]), (4, [4]), (2, [2, 2]), (3, [3, 1])]:
        branch.length, decoder.fed = 0, []
        again = sample_checked(decoder, branch, lead, None, chance, sampling, plain.tokens, window)
        assert torch.equal(again.tokens, plain.tokens)
        assert decoder.fed == fed
        assert branch.length == 4
    for wrong in range(4):
        guess = plain.tokens.clone()
        guess[1, wrong] += 1
        branch.length, decoder.fed = 0, []
        again = sample_checked(decoder, branch, lead, None, chance, sampling, guess, None)
        assert torch.equal(again.tokens, plain.tokens)
        assert decoder.fed[:2] == ([4] if wrong == 3 else [4, 3 - wrong])  # the draws behind a wrong guess are the next


@torch.inference_mode()
def test_exact_in_distribution(tiny_world_model: Build, assert_frequencies: Callable[[Tensor, Tensor], None]) -> None:
    model, vocab = tiny_world_model(), tiny_world_model().layout.vocab_size
    for parameter in model.transformer.parameters():  # tokens that depend on the ones before
        parameter.mul_(4.0)
    decoder, layout, sampling = TorchDecoder(model.transformer, "float32"), model.layout, Sampling(1.0, 4)
    rows = 4000
    context = layout.prompt(model.tokenizer.encode_context(clip(1))[0])[:, :-1]
    lead = torch.full((rows, 1), layout.dynamics_slot_id)
    branch = decoder.branch(decoder.prefill(context), rows, 4)
    guess = torch.randint(vocab, (1, 3), generator=seeded(1)).expand(rows, -1)
    drawn = sample_checked(
        decoder, branch, lead, None, torch.rand(rows, 3, generator=seeded(2)), sampling, guess, None
    ).tokens  # fmt: skip

    def probabilities(before: Tensor) -> Tensor:
        one = decoder.branch(decoder.prefill(context), 1, 4)
        logits = decoder.logits(decoder.feed(one, torch.cat([lead[:1], before[None]], dim=1))[0, -1], sampling)
        return logits.masked_fill(logits < logits.topk(4).values[-1], -torch.inf).softmax(0)

    assert_frequencies(drawn[:, 0], probabilities(drawn[0, :0]))
    likeliest = drawn[:, 0].mode().values
    second = drawn[drawn[:, 0] == likeliest]
    assert_frequencies(second[:, 1], probabilities(likeliest[None]))
    third = second[second[:, 1] == second[:, 1].mode().values]
    assert_frequencies(third[:, 2], probabilities(third[0, :2]))


@pytest.mark.parametrize("order", ["raster", "diagonal"])
def test_enough_passes_are_exact(tiny_world_model: Build, order: str) -> None:
    model = tiny_world_model(ACTION_DIM)
    passes = 4 if order == "raster" else 7  # three diagonals of the 2 x 2 grid, then four passes over all
    settings: dict[str, Any] = {"horizon": 5, "temperature": 1.0, "top_k": 10}
    plain = model.rollout(clip(), some_actions(), generator=seeded(), **settings)
    speculation = Speculation(window=None, passes=passes, order=order)
    approximate = model.rollout(clip(), some_actions(), generator=seeded(), speculation=speculation, **settings)
    assert torch.equal(plain.tokens, approximate.tokens)


@torch.inference_mode()
def test_passes_of_the_approximate_modes(tiny_world_model: Build) -> None:
    model = tiny_world_model()
    decoder = Counting(TorchDecoder(model.transformer, "float32"))
    layout, sampling, chance = model.layout, Sampling(0.0), torch.zeros(2, 4)
    context = layout.prompt(model.tokenizer.encode_context(clip())[0])[:, :-1]
    lead, guess = torch.full((2, 1), layout.dynamics_slot_id), torch.full((2, 4), 40)
    for speculation, fed in [
        (Speculation(None, passes=1), [4]),
        (Speculation(None, passes=2), [4, 3]),
        (Speculation(None, order="diagonal"), [4, 3, 3]),
    ]:
        branch, decoder.fed = decoder.branch(decoder.prefill(context), 1, 20), []
        sampled = sample_approximate(decoder, branch, lead, None, chance, sampling, guess, speculation)
        assert decoder.fed == fed
        assert branch.length == 1
        plain = decoder.sample(decoder.branch(decoder.prefill(context), 1, 20), lead, None, chance, sampling)
        assert torch.equal(sampled.tokens[:, 0], plain.tokens[:, 0])  # it depends on nothing that was guessed


def test_a_session_speculates_like_a_rollout(tiny_world_model: Build) -> None:
    model = tiny_world_model(ACTION_DIM, reward=True)
    for speculation in (Speculation(2), Speculation(None, passes=2)):
        rolled = model.rollout(
            clip(), some_actions(), horizon=4, generator=seeded(), speculation=speculation, top_k=10
        )  # fmt: skip
        session = model.session(clip(), generator=seeded(), speculation=speculation, top_k=10)
        rewards = [session.step(some_actions()[:, 1 + index])[1] for index in range(4)]
        assert torch.equal(session.tokens, rolled.tokens)
        torch.testing.assert_close(torch.stack(rewards, dim=1), rolled.rewards, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window of a speculation must be an integer >= 1 or None, got 0"),
        ({"window": None, "passes": 1.5}, "passes of a speculation.*got 1.5"),
        ({"window": 4, "passes": 2}, "give window=None, got 4"),
        ({"order": "spiral"}, "raster, diagonal, got 'spiral'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Speculation(**settings)


def test_diagonals_need_a_square(tiny_world_model: Build) -> None:
    from ivideogpt.rollout.speculation import _diagonals

    assert [mask.nonzero().flatten().tolist() for mask in _diagonals(4, torch.device("cpu"))] == [[0], [1, 2], [3]]
    with pytest.raises(ValueError, match="square grid of tokens, got 5"):
        _diagonals(5, torch.device("cpu"))
