"""Tests of GRPOModule: its probabilities are the transformer's, its loss GRPO's, and it learns what is rewarded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from ivideogpt.training import GRPOModule, TransformerModule
from ivideogpt.training.bad_updates import NonFiniteLossError


@pytest.fixture
def model(tiny_world_model):
    return tiny_world_model(action_dim=3, reward=True)


def clips(count: int = 2, frames: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "video": torch.rand(count, frames, 3, 32, 32, generator=generator),
        "actions": torch.rand(count, frames, 3, generator=generator),
        "rewards": torch.rand(count, frames, generator=generator),
        "key": [f"clip-{index}" for index in range(count)],
    }


def grpo(model, **settings: Any) -> GRPOModule:
    return GRPOModule(model.transformer, model.tokenizer, model.reward_head, perceptual_weight=0.0, **settings)


def test_probabilities_behind_a_shared_context_are_those_of_whole_sequences(model) -> None:
    module, batch = grpo(model, group_size=3, temperature=0.7), clips()
    tokens = module.futures(batch, 3).tokens
    shared = module.log_probabilities(module.transformer, tokens, batch)
    plain = TransformerModule(model.transformer, model.tokenizer)
    rows = {"tokens": tokens, "actions": batch["actions"].repeat_interleave(3, dim=0)}
    out = plain.predict_clip(rows)
    probabilities = (out.logits[:, :-1].float() / 0.7).log_softmax(-1).gather(-1, out.labels[:, 1:, None]).squeeze(-1)
    stride = module.layout.frame_stride
    drawn = torch.arange(probabilities.shape[1]) % stride != stride - 1  # what is left out are slots
    expected = probabilities[:, drawn].unflatten(1, (3, -1))
    torch.testing.assert_close(shared, expected, rtol=1e-4, atol=1e-5)
    parameters = [p for p in model.transformer.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(shared.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_rewards_are_errors_of_the_frames_with_the_sign_turned(model) -> None:
    module, batch = grpo(model, l1_weight=2.0, reward_error_weight=0.5), clips()
    imagined = module.futures(batch, 4, torch.Generator().manual_seed(1))
    judged = module.judge(imagined, batch)
    truth = batch["video"][:, 2:].repeat_interleave(4, dim=0)
    l1 = (imagined.video[:, 2:] - truth).abs().flatten(1).mean(1)
    rewards = (imagined.rewards - batch["rewards"][:, 2:].repeat_interleave(4, dim=0)).abs().mean(1)
    torch.testing.assert_close(judged["reward"], -2 * l1 - 0.5 * rewards)


def test_loss_is_that_of_grpo(model) -> None:
    module = grpo(model, clip_range=0.2, kl_weight=0.1)
    old = torch.full((2, 1, 2), -1.0)
    new = old + torch.tensor([[[0.5, 0.0]], [[0.5, -0.5]]])
    terms = module.policy_losses(new, old, old, torch.tensor([1.0, -1.0]))
    up, down = torch.tensor(0.5).exp(), torch.tensor(-0.5).exp()
    # what would move too far in the direction of its advantage is clipped, what has to come back is not
    assert terms["policy_loss"].item() == pytest.approx(-((1.2 + 1.0) - (up + 0.8)).item() / 4)
    assert terms["clipped"].item() == 0.75
    kl = ((down + 0.5 - 1) * 2 + (up - 0.5 - 1)) / 4
    assert terms["kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert terms["loss"].item() == pytest.approx((terms["policy_loss"] + 0.1 * kl).item())


def test_training_raises_the_reward_and_touches_nothing_else(model, trainer) -> None:
    module = grpo(model, group_size=16, learning_rate=1e-2, kl_weight=0.0)
    batch = clips(count=1)
    wanted = module.futures(batch, 1, torch.Generator().manual_seed(3)).video  # one that the model can imagine
    batch["video"] = torch.cat([batch["video"][:, :2], wanted[:, 2:]], dim=1)
    parts: list[Any] = [module.tokenizer, module.reward_head]
    before = [copy.deepcopy(part.state_dict()) for part in parts]
    start = module.judge(module.futures(batch, 64, torch.Generator().manual_seed(2)), batch)["reward"].mean()
    loader: Any = torch.utils.data.DataLoader([batch] * 30, batch_size=None)  # type: ignore[arg-type]
    trainer(max_steps=30, limit_val_batches=0).fit(module, loader, loader)
    end = module.judge(module.futures(batch, 64, torch.Generator().manual_seed(2)), batch)["reward"].mean()
    assert end > 0.9 * start  # both are negative
    for part, state in zip(parts, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in part.state_dict().items())


def test_inner_updates_count_as_updates_and_the_start_model_stays(model, data, trainer) -> None:
    module = grpo(model, group_size=2, inner_updates=2, learning_rate=1e-3)
    assert module.reference is not None
    start = copy.deepcopy(module.reference.state_dict())
    run = trainer(max_steps=6)
    run.fit(module, datamodule=data())
    assert run.global_step == 6
    assert run.callback_metrics["train/kl"] > 0
    assert {"val/reward", "val/l1", "val/psnr", "val/mse", "train/reward_spread"} <= run.callback_metrics.keys()
    assert all(torch.equal(value, start[name]) for name, value in module.reference.state_dict().items())
    assert not any(name.startswith(("reference", "tokenizer", "reward_head")) for name in module.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 1}, "group_size 1 must be at least 2"),
        ({"l1_weight": 0.0}, "must be rewarded for something"),
        ({"temperature": 0.0}, "temperature 0.0 must be positive"),
        ({"kl_weight": -1.0}, "kl_weight -1.0 not negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo(model, **settings)
    with pytest.raises(ValueError, match="has no reward head"):
        GRPOModule(model.transformer, model.tokenizer, reward_error_weight=1.0)


def test_a_bad_loss_ends_the_training(model, data, trainer, monkeypatch) -> None:
    module = grpo(model, group_size=2)
    monkeypatch.setattr(module, "judge", lambda *_: {"reward": torch.full((4,), torch.nan)})
    with pytest.raises(NonFiniteLossError, match=r"\['square-00\d', 'square-00\d'\]"):
        trainer(limit_val_batches=0).fit(module, datamodule=data())
