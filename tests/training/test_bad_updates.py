"""Updates whose loss is not finite or too large: left out, counted, and the end of the training when there are many."""

from __future__ import annotations

import copy
import signal

import pytest
import torch

from ivideogpt.models.discriminator import PatchDiscriminator
from ivideogpt.training import TokenizerModule, TransformerModule
from ivideogpt.training.callbacks import Throughput
from ivideogpt.training.checkpoints import Checkpoints
from ivideogpt.training.logs import MetricsCSV
from ivideogpt.training.module import NonFiniteLossError


def module_of(model, **settings) -> TransformerModule:
    return TransformerModule(
        model.transformer, model.tokenizer, model.reward_head, warmup_updates=0, learning_rate=1e-2, **settings
    )


def test_bad_updates_change_nothing(tiny_world_model, data, trainer) -> None:
    module = module_of(tiny_world_model(action_dim=3, reward=True), max_bad_updates=3, loss_limit=1e-6)
    before = copy.deepcopy(module.state_dict())
    with pytest.warns(UserWarning, match="train/loss is") as caught:
        trainer(max_steps=3).fit(module, datamodule=data())
    messages = [str(one.message) for one in caught if "train/loss" in str(one.message)]
    assert len(messages) == 3
    assert "(loss_limit is 1e-06) at update 2" in messages[2]
    assert messages[2].endswith("left out, 3 of at most 3 in a row")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.filterwarnings("ignore:train/loss is")
def test_too_many_in_a_row_end_the_training_and_name_the_clips(tiny_world_model, data, trainer) -> None:
    module = module_of(tiny_world_model(action_dim=3, reward=True), max_bad_updates=2, loss_limit=1e-6)
    with pytest.raises(
        NonFiniteLossError, match=r"at update 2, in the batch of clips \['square-00\d', 'square-00\d'\]"
    ):
        trainer(max_steps=9).fit(module, datamodule=data())


@pytest.mark.filterwarnings("ignore:train/loss is")
def test_a_nan_in_the_middle_is_passed_over(tiny_world_model, data, trainer, monkeypatch) -> None:
    module = module_of(tiny_world_model(action_dim=3, reward=True), max_bad_updates=1)
    losses = module.losses

    def spoilt(out, batch):
        terms = losses(out, batch)
        return {**terms, "loss": terms["loss"] * float("nan")} if module.global_step == 1 else terms

    before = copy.deepcopy(module.state_dict())
    monkeypatch.setattr(module, "losses", spoilt)
    trainer(max_steps=3).fit(module, datamodule=data())
    after = module.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.filterwarnings("ignore:train/loss is")
def test_a_bad_update_leaves_the_discriminator_alone_too(tiny_world_model, data, trainer) -> None:
    critic = PatchDiscriminator(3, 8, 2)
    module = TokenizerModule(
        tiny_world_model().tokenizer, perceptual_weight=0.0, discriminator=critic, max_bad_updates=5, loss_limit=1e-6
    )
    before = copy.deepcopy(module.state_dict())
    trainer(max_steps=2).fit(module, datamodule=data())
    learnt = dict(module.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in learnt.items())


def test_accumulation_with_a_discriminator(tiny_world_model, data, trainer) -> None:
    def weights(batch_size: int, accumulate: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = TokenizerModule(
            tiny_world_model(attention_dropout=0.0).tokenizer, perceptual_weight=0.0,
            discriminator=PatchDiscriminator(3, 8, 2),
            discriminator_start=99, accumulate=accumulate,
        )  # fmt: skip
        fit = trainer(max_steps=2)
        fit.fit(module, datamodule=data(batch_size=batch_size))
        assert fit.global_step == 2
        return module.tokenizer.state_dict()

    one, two = weights(4, 1), weights(2, 2)
    differences = torch.cat([(one[name] - two[name]).abs().flatten() for name in one])
    assert (differences > 1e-6).float().mean() < 1e-3  # signs of all but zero gradients are a matter of rounding
    with pytest.raises(ValueError, match=r"accumulate is 2: .*accumulate_grad_batches"):
        TokenizerModule(tiny_world_model().tokenizer, accumulate=2)


def test_norm_rate_and_speed_are_logged(tiny_world_model, data, trainer, tmp_path) -> None:
    module = module_of(tiny_world_model(action_dim=3, reward=True))
    fit = trainer(max_steps=2, logger=MetricsCSV(tmp_path), log_every_n_steps=1, callbacks=[Throughput()])
    fit.fit(module, datamodule=data())
    assert fit.logged_metrics["train/gradient_norm"] > 0
    assert 0 < fit.logged_metrics["train/learning_rate"] <= 1e-2
    assert fit.logged_metrics["train/tokens_per_second"] > 0
    text = (tmp_path / "metrics.csv").read_text()
    assert "train/gradient_norm" in text.splitlines()[0]


@pytest.mark.filterwarnings("ignore:train/loss is")
@pytest.mark.parametrize("fails", [False, True])
def test_sigterm_is_the_callers_again_after_a_training(fails: bool, tiny_world_model, data, trainer) -> None:
    before = signal.getsignal(signal.SIGTERM)
    module = module_of(tiny_world_model(action_dim=3, reward=True), loss_limit=1e-6 if fails else None)
    fit = trainer(max_steps=1, callbacks=[Checkpoints()], enable_checkpointing=True)
    if fails:
        with pytest.raises(NonFiniteLossError):
            fit.fit(module, datamodule=data())
    else:
        fit.fit(module, datamodule=data())
    assert signal.getsignal(signal.SIGTERM) == before
