"""The public face: the published computation end to end, what it accepts, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ivideogpt
from ivideogpt.config import WorldModelConfig
from ivideogpt.world_model import WorldModel


@pytest.fixture
def tiny(tiny_world_model: Callable[..., WorldModel]) -> Callable[..., WorldModel]:
    """Tiny model; its middle feature maps are too wide for cross-attention, as in the published ones."""
    return lambda *arguments, **fields: tiny_world_model(*arguments, **{"max_attention_resolution": 8, **fields})


# the published computation


@pytest.mark.parametrize("name", ["oxe-64-act-free", "bair-64-act-cond"])
def test_golden_checkpoints_through_the_public_contract(golden: Callable[[str], Any], name: str) -> None:
    case = golden(name)
    recorded = case.tensors
    model = ivideogpt.from_pretrained(case.folder)
    assert not any(module.training for module in model.modules())
    actions = recorded.get("actions")
    context = model.config.context_length
    with torch.no_grad():
        tokens, labels = model.tokenizer.tokenize(case.video)
        out = model(tokens, actions, labels)
        video = model.tokenizer.detokenize(tokens)
    assert torch.equal(tokens, recorded["tokens"])
    assert torch.equal(labels, recorded["labels"])
    torch.testing.assert_close(out.logits[:, -64:], recorded["logits_last64"], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.loss.view(1), recorded["loss"], atol=0, rtol=1e-5)
    torch.testing.assert_close(video, recorded["reconstruction"].float(), atol=4e-3, rtol=0)
    assert out.rewards is None

    horizon = recorded["greedy_video"].shape[1] - context
    pred = model.rollout(case.video[:, :context], actions, horizon=horizon, temperature=0)
    assert torch.equal(pred.tokens, recorded["greedy_tokens"])
    assert pred.rewards is None
    session = model.session(case.video[:, :context], temperature=0)
    for step in range(horizon):
        frame, reward = session.step(None if actions is None else actions[:, context - 1 + step])
        torch.testing.assert_close(frame, pred.video[:, context + step], atol=1e-5, rtol=0)
        assert reward is None


# composition


def test_a_model_of_random_weights() -> None:
    config = WorldModelConfig.preset("nano", action_dim=3, reward=True, context_length=1)
    model = ivideogpt.WorldModel(config)
    assert model.config == config
    assert (model.layout, model.extras) == (config.layout, {})
    assert model.reward_head is not None
    assert set(dict(model.named_children())) == {"tokenizer", "transformer", "reward_head"}


def test_parts_are_shared_and_must_fit(tiny: Callable[..., WorldModel]) -> None:
    one, other = tiny(action_dim=2), tiny(codebook_size=16)
    model = WorldModel.from_parts(one.tokenizer, one.transformer, extras={"recipe": "r"})
    assert model.tokenizer is one.tokenizer
    assert model.config == one.config
    with pytest.raises(ValueError, match="66 token ids .* vocabulary of 82"):
        WorldModel.from_parts(other.tokenizer, one.transformer)
    with pytest.raises(ValueError, match="action_mean has 1 values for actions of size 2"):
        WorldModel.from_parts(one.tokenizer, one.transformer, extras={"action_mean": [0.0], "action_std": [1.0]})
    with pytest.raises(ValueError, match="unknown field 'recipes'"):
        WorldModel.from_parts(one.tokenizer, one.transformer, extras={"recipes": "r"})


def test_rewards_are_read_at_the_last_dynamics_token(tiny: Callable[..., WorldModel]) -> None:
    model = tiny(action_dim=2, reward=True)
    layout = model.layout
    assert model.reward_head is not None
    tokens = torch.randint(0, layout.vocab_size, (3, layout.sequence_length(5)))
    actions = torch.randn(3, 5, 2)
    with torch.no_grad():
        out = model(tokens, actions)
        positions = layout.slot_positions(3)
        hidden = model.transformer(tokens, actions[:, 1:4], positions).hidden
        expected = model.reward_head.predict(hidden[:, positions + layout.dynamics_tokens_per_frame])
    assert out.rewards.shape == (3, 3)
    torch.testing.assert_close(out.rewards, expected)
    assert out.loss is None
    # the last action leads out of the clip
    with torch.no_grad():
        assert torch.equal(model(tokens, actions[:, :4]).logits, out.logits)


def test_action_statistics_are_applied_once_everywhere(tiny: Callable[..., WorldModel]) -> None:
    plain, normal = tiny(action_dim=2, reward=True), tiny(action_dim=2, reward=True)
    normal.extras |= {"action_mean": [1.0, -2.0], "action_std": [0.5, 4.0]}
    raw = torch.randn(2, 5, 2)
    scaled = (raw - torch.tensor([1.0, -2.0])) / torch.tensor([0.5, 4.0])
    torch.testing.assert_close(normal.normalize_actions(raw), scaled)
    assert plain.normalize_actions(raw) is raw
    context = torch.rand(2, 2, 3, 32, 32)
    tokens = torch.randint(0, 82, (2, plain.layout.sequence_length(4)))
    with torch.no_grad():
        torch.testing.assert_close(normal(tokens, raw[:, :4]).logits, plain(tokens, scaled[:, :4]).logits)
    expected = plain.rollout(context, scaled, temperature=0)
    found = normal.rollout(context, raw, temperature=0)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.rewards, expected.rewards)
    session = normal.session(context, temperature=0)
    rewards = torch.stack([session.step(raw[:, 1 + step])[1] for step in range(3)], dim=1)  # type: ignore[misc]
    assert torch.equal(session.tokens, expected.tokens)
    torch.testing.assert_close(rewards, expected.rewards)
    with pytest.raises(ValueError, match=r"actions must be of size 2 for this model, got shape \(5, 3\)"):
        normal.normalize_actions(torch.randn(5, 3))


def test_the_horizon_follows_the_actions_or_the_positions(tiny: Callable[..., WorldModel]) -> None:
    context = torch.rand(1, 2, 3, 32, 32)
    with_actions, without = tiny(action_dim=1), tiny()
    assert with_actions.rollout(context, torch.zeros(1, 5, 1)).video.shape[1] == 5
    assert with_actions.rollout(context, torch.zeros(1, 5, 1), horizon=4).video.shape[1] == 6
    assert without.rollout(context, num_samples=2, horizon=3).video.shape == (2, 5, 3, 32, 32)
    assert without.rollout(context).video.shape[1] - 2 == without.config.max_horizon


def test_a_bfloat16_model_takes_float32_frames(tiny: Callable[..., WorldModel], tmp_path: Path) -> None:
    folder = tiny(action_dim=2, reward=True).save_pretrained(tmp_path / "model")
    model = ivideogpt.from_pretrained(folder, dtype=torch.bfloat16)
    pred = model.rollout(torch.rand(2, 2, 3, 32, 32), torch.randn(2, 4, 2))
    assert pred.video.dtype == torch.float32
    assert pred.rewards is not None
    assert torch.isfinite(pred.rewards).all()


# bad input: one clear error with the offending value

CONTEXT = torch.full((2, 2, 3, 32, 32), 0.5)
ACTIONS = torch.zeros(2, 4, 2)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (CONTEXT[0], r"\(B, T, C, H, W\), got \(2, 3, 32, 32\)"),
        (CONTEXT[..., :16], r"\(3, 32, 32\) for this model, got \(3, 32, 16\)"),
        (CONTEXT[:, :, :1], r"got \(1, 32, 32\)"),
        (CONTEXT.permute(0, 1, 3, 4, 2), r"got \(32, 32, 3\)"),
        ((CONTEXT * 255).to(torch.uint8), r"got torch.uint8"),
        (CONTEXT * 255, r"\[0, 1\], got values from 127.5 to 127.5"),
        (CONTEXT * 2 - 1.5, r"got values from -0.5 to -0.5"),
        (CONTEXT * float("nan"), r"got values from nan to nan"),
        (CONTEXT[:, :1], r"takes 2 context frames, got 1"),
        (CONTEXT.repeat(1, 2, 1, 1, 1), r"takes 2 context frames, got 4"),
        (CONTEXT[:0], r"holds no clip"),
        (CONTEXT.numpy(), r"must be a tensor"),
        (None, r"must be a tensor"),
    ],
)
def test_refused_context_frames(tiny: Callable[..., WorldModel], context: Any, message: str) -> None:
    model = tiny()
    for call in (model.rollout, model.session):
        with pytest.raises(ValueError, match=message):
            call(context)


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (None, r"needs actions of width 2, got None"),
        (ACTIONS[..., :1], r"got \(2, 4, 1\)"),
        (ACTIONS[0], r"got \(4, 2\)"),
        (ACTIONS[:1], r"got \(1, 4, 2\)"),
        (ACTIONS[:, :1], r"at least 3 actions .*, got 1"),
        (ACTIONS * float("nan"), r"must be finite, got nan"),
        (ACTIONS + float("inf"), r"must be finite, got inf"),
    ],
)
def test_refused_actions(tiny: Callable[..., WorldModel], actions: Any, message: str, statistics: bool) -> None:
    model = tiny(action_dim=2)
    if statistics:
        model.extras |= {"action_mean": [0.0, 0.0], "action_std": [1.0, 1.0]}
    with pytest.raises(ValueError, match=message):
        model.rollout(CONTEXT, actions, horizon=2)
    tokens = torch.zeros(2, model.layout.sequence_length(4), dtype=torch.int64)
    with pytest.raises(ValueError, match=message.replace("at least 3 actions .*", "4 frames need 4 actions.*")):
        model(tokens, actions)


def test_actions_for_a_model_without_actions(tiny: Callable[..., WorldModel]) -> None:
    model = tiny()
    tokens = torch.zeros(2, model.layout.sequence_length(4), dtype=torch.int64)
    for call in (lambda: model.rollout(CONTEXT, ACTIONS), lambda: model(tokens, ACTIONS)):
        with pytest.raises(ValueError, match=r"takes no actions .*action_dim="):
            call()
    with pytest.raises(ValueError, match="takes no actions"):
        model.session(CONTEXT).step(ACTIONS[:, 0])


def test_a_horizon_beyond_the_positions(tiny: Callable[..., WorldModel]) -> None:
    model = tiny()
    longest = model.config.max_horizon
    with pytest.raises(ValueError, match=rf"horizon of {longest + 1} frames .* 256 positions, which hold {longest}"):
        model.rollout(CONTEXT, horizon=longest + 1)
    with pytest.raises(ValueError, match="horizon must be an integer >= 1, got 0"):
        model.rollout(CONTEXT, horizon=0)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 139), r"tokens must be int64 of shape \(B, L\), got torch.float32 of shape \(2, 139\)"),
        (torch.zeros(139, dtype=torch.int64), r"got torch.int64 of shape \(139,\)"),
        ([[1, 2]], r"got list"),
        (torch.full((2, 139), 82), r"tokens must lie in 0..81 for this model, got 82 to 82"),
        (torch.full((2, 139), -1), r"got -1 to -1"),
        (torch.zeros(2, 130, dtype=torch.int64), r"130 tokens is no whole clip"),
        (torch.zeros(2, 129 + 5 * 26, dtype=torch.int64), r"length 259 are beyond the model's 256 positions"),
    ],
)
def test_refused_tokens(tiny: Callable[..., WorldModel], tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny()(tokens)


def test_refused_labels(tiny: Callable[..., WorldModel]) -> None:
    model, tokens = tiny(), torch.zeros(2, 139, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels \(2, 138\) and tokens \(2, 139\) differ in shape"):
        model(tokens, labels=tokens[:, :-1])
    with pytest.raises(ValueError, match=r"labels must lie in -100..81 for this model, got -101"):
        model(tokens, labels=tokens - 101)
