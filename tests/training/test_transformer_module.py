"""Tests of TransformerModule and RewardModule."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ivideogpt.models.reward_head import symlog
from ivideogpt.training import RewardModule, TransformerModule


@pytest.fixture
def model(tiny_world_model):
    return tiny_world_model(action_dim=3, reward=True)


def clips(frames: int = 5) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "video": torch.rand(2, frames, 3, 32, 32, generator=generator),
        "actions": torch.rand(2, frames, 3, generator=generator),
        "rewards": torch.rand(2, frames, generator=generator) * 4,
        "key": ["a", "b"],
    }


def test_loss_equals_that_of_the_world_model(model) -> None:
    module = TransformerModule(model.transformer, model.tokenizer, model.reward_head, reward_weight=0.5).eval()
    batch = clips()
    tokens, labels = model.tokenizer.tokenize(batch["video"])
    out = model(tokens, batch["actions"], labels)
    terms = module.losses(module.predict_clip(batch), batch)
    torch.testing.assert_close(terms["token_loss"], out.loss, rtol=1e-5, atol=1e-6)
    reward_loss = F.mse_loss(symlog(out.rewards), symlog(batch["rewards"][:, 2:]))
    torch.testing.assert_close(terms["reward_loss"], reward_loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["loss"], terms["token_loss"] + 0.5 * terms["reward_loss"])


def test_actions_are_normalised_with_the_given_statistics(model) -> None:
    batch = clips()
    plain = TransformerModule(model.transformer, model.tokenizer).eval()
    assert plain.action_statistics == {}
    scaled = TransformerModule(
        model.transformer, model.tokenizer, action_mean=[1.0, 2.0, 3.0], action_std=[2.0, 2.0, 4.0]
    ).eval()
    assert scaled.action_statistics == {"action_mean": [1.0, 2.0, 3.0], "action_std": [2.0, 2.0, 4.0]}
    raw = {**batch, "actions": batch["actions"] * torch.tensor([2.0, 2.0, 4.0]) + torch.tensor([1.0, 2.0, 3.0])}
    torch.testing.assert_close(scaled.predict_clip(raw).logits, plain.predict_clip(batch).logits, rtol=1e-4, atol=1e-4)


def test_joint_training_changes_transformer_and_head_and_nothing_else(model, data, trainer) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    module = TransformerModule(model.transformer, model.tokenizer, model.reward_head, learning_rate=1e-2,
                               warmup_updates=0)  # fmt: skip
    run = trainer(max_steps=3)
    run.fit(module, datamodule=data())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if not name.startswith("tokenizer.")}
    assert {"train/loss", "train/token_loss", "train/reward_loss", "val/token_accuracy"} <= run.callback_metrics.keys()
    assert {"val/loss", "val/reward_correlation"} <= run.callback_metrics.keys()
    assert -1 <= run.callback_metrics["val/reward_correlation"] <= 1


def test_the_frozen_tokenizer_stays_in_eval_mode_and_out_of_the_state(model) -> None:
    module = TransformerModule(model.transformer, model.tokenizer, model.reward_head)
    module.train()
    assert module.transformer.training
    assert not module.tokenizer.training
    assert not any(parameter.requires_grad for parameter in module.tokenizer.parameters())
    state = module.state_dict()
    assert {name.split(".")[0] for name in state} == {"transformer", "reward_head"}
    module.load_state_dict(state)  # strict
    state.pop("transformer.norm.weight")
    with pytest.raises(RuntimeError, match=r"transformer\.norm\.weight"):
        module.load_state_dict(state)


def test_freeze_names_parts(model, data, trainer) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    module = TransformerModule(
        model.transformer, model.tokenizer, model.reward_head, freeze=["reward_head", "transformer.embed_tokens"],
        learning_rate=1e-2, warmup_updates=0,
    )  # fmt: skip
    trainer(max_steps=1).fit(module, datamodule=data())
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert {"reward_head.linear.weight", "transformer.embed_tokens.weight"} <= same
    assert "transformer.lm_head.weight" not in same


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer", "no part of the transformer"),
        ("transformer.embed", r"no 'transformer.embed'; parts are .*embed_t"),
    ],
)
def test_freezing_what_is_not_there_is_refused(model, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerModule(model.transformer, model.tokenizer, freeze=[name])


def test_reward_module_changes_the_head_alone(model, data, trainer) -> None:
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    module = RewardModule(model.reward_head, model.transformer, model.tokenizer, learning_rate=1e-2)
    run = trainer(max_steps=20)
    run.fit(module, datamodule=data())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"reward_head.linear.weight", "reward_head.linear.bias"}
    assert {"train/reward_loss", "val/reward_correlation"} <= run.callback_metrics.keys()


def test_data_that_do_not_fit_are_refused(model, tiny_world_model) -> None:
    module = TransformerModule(model.transformer, model.tokenizer, model.reward_head)
    batch = clips()
    with pytest.raises(ValueError, match="takes actions of size 3, the batch has none"):
        module.predict_clip({"video": batch["video"]})
    with pytest.raises(ValueError, match="takes actions of size 3, the batch has actions of size 2"):
        module.predict_clip({**batch, "actions": batch["actions"][..., :2]})
    with pytest.raises(ValueError, match="the data have no rewards"):
        module.losses(module.predict_clip(batch), {key: batch[key] for key in ("video", "actions")})
    with pytest.raises(ValueError, match="40 frames takes 319 positions, the transformer has 256"):
        module.predict_clip(clips(40))
    other = tiny_world_model(codebook_size=64)
    with pytest.raises(ValueError, match="82 token ids .* vocabulary of 114"):
        TransformerModule(other.transformer, model.tokenizer)
    with pytest.raises(ValueError, match="action_std must have 3 values"):
        TransformerModule(model.transformer, model.tokenizer, action_mean=[0, 0, 0], action_std=[1])
    with pytest.raises(ValueError, match="belong together"):
        TransformerModule(model.transformer, model.tokenizer, action_mean=[0, 0, 0])


def test_imagined_clips_are_rollouts_and_the_same_each_time(model) -> None:
    module = TransformerModule(model.transformer, model.tokenizer, model.reward_head)
    first, second = module.imagine(clips()), module.imagine(clips())
    assert first.shape == (2, 5, 3, 32, 32)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
