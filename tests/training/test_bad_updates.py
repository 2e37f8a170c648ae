"""Updates whose loss is not finite or too large: left out, counted, and the end of the training when there are many."""

from __future__ import annotations

import copy
import signal

import pytest
import torch

from ivideogpt.models.discriminator import PatchDiscriminator
from ivideogpt.training import TokenizerModule, TransformerModule
from ivideogpt.training.bad_updates import NonFiniteLossError
from ivideogpt.training.callbacks import Throughput
from ivideogpt.training.checkpoints import Checkpoints, checkpoint_files, latest_checkpoint
from ivideogpt.training.logs import MetricsCSV
from ivideogpt.training.module import TrainingModule


def module_of(model, **settings) -> TransformerModule:
    return TransformerModule(
        model.transformer, model.tokenizer, model.reward_head, warmup_updates=0, learning_rate=1e-2, **settings
    )


def test_bad_updates_change_nothing(tiny_world_model, data, trainer) -> None:
    module = module_of(tiny_world_model(action_dim=3, reward=True), max_bad_updates=3, loss_limit=1e-6)
    before = copy.deepcopy(module.state_dict())
    end = r"at the end of the training, update 3: 3\. .*max_steps=4"
    with pytest.warns(UserWarning, match="train/loss is") as caught, pytest.raises(NonFiniteLossError, match=end):
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
    with pytest.raises(NonFiniteLossError, match="at the end of the training, update 2: 2"):
        trainer(max_steps=2).fit(module, datamodule=data())
    learnt = dict(module.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in learnt.items())


def spoil(module, monkeypatch, when) -> None:
    """Multiplies the loss of the batches that ``when`` (their number) is true of by NaN."""
    losses, batches = module.losses, []

    def spoilt(*args):
        terms = losses(*args)
        batches.append(terms)
        return {**terms, "loss": terms["loss"] * (float("nan") if when(len(batches) - 1) else 1.0)}

    monkeypatch.setattr(module, "losses", spoilt)


@pytest.mark.filterwarnings("ignore:train/loss is")
@pytest.mark.parametrize("manual", [False, True])
def test_updates_are_counted_and_not_their_batches(manual, tiny_world_model, data, trainer, monkeypatch) -> None:
    module: TrainingModule
    if manual:
        module = TokenizerModule(
            tiny_world_model().tokenizer, perceptual_weight=0.0, discriminator=PatchDiscriminator(3, 8, 2),
            accumulate=4, max_bad_updates=2,
        )  # fmt: skip
    else:
        module = module_of(tiny_world_model(action_dim=3, reward=True), max_bad_updates=2)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    spoil(module, monkeypatch, lambda batch: batch % 4 == 0)
    fit = trainer(max_steps=9, limit_val_batches=0, **({} if manual else {"accumulate_grad_batches": 4}))
    clips = r"\['square-00\d', 'square-00\d'\]"  # of the one batch that is to blame
    with pytest.raises(NonFiniteLossError, match=rf"train/loss is nan at update 2, in the batch of clips {clips}\. "):
        fit.fit(module, datamodule=data())
    assert all(torch.equal(value, before[name]) for name, value in module.named_parameters())


@pytest.mark.filterwarnings("ignore:train/gradient_norm is")
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("manual", [False, True])
def test_gradients_that_are_not_finite_are_left_out(manual, clip, tiny_world_model, data, trainer, tmp_path) -> None:
    critic = PatchDiscriminator(3, 8, 2) if manual else None
    module = TokenizerModule(
        tiny_world_model().tokenizer, perceptual_weight=0.0, discriminator=critic, max_bad_updates=1, gradient_clip=clip
    )
    weight = next(iter((critic or module.tokenizer).parameters()))
    bad = (1, 4, 5)
    weight.register_hook(lambda grad: grad * (float("inf") if module.global_step in bad else 1.0))
    fit = trainer(max_steps=9, callbacks=[Checkpoints(1, keep=9)], enable_checkpointing=True)
    with pytest.raises(
        NonFiniteLossError, match=r"train/gradient_norm is (nan|inf) at update 5, in the batch of clips"
    ):
        fit.fit(module, datamodule=data())
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    # 2 and 5 come after updates that were left out; 4 waits for the good loss that never came
    names = [f"update-{update:06d}.ckpt" for update in (1, 3)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [*names, "update-000004.ckpt.diverged"]


def diverging(model, **settings) -> TokenizerModule:
    torch.manual_seed(0)
    settings = {"learning_rate": 3.0, "warmup_updates": 100, "max_bad_updates": 8, "loss_limit": 50.0, **settings}
    return TokenizerModule(model.tokenizer, perceptual_weight=0.0, **settings)


@pytest.mark.filterwarnings("ignore:train/loss is")
@pytest.mark.parametrize("manual", [False, True])
def test_diverged_weights_are_not_what_a_resume_takes(manual, tiny_world_model, data, trainer, tmp_path) -> None:
    critic = {"discriminator": PatchDiscriminator(3, 8, 2), "discriminator_start": 99} if manual else {}
    module = diverging(tiny_world_model(), **critic)
    fit = trainer(max_steps=60, callbacks=[Checkpoints(1)], enable_checkpointing=True)
    with pytest.raises(NonFiniteLossError) as caught:
        fit.fit(module, datamodule=data())
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest is not None and f"{newest[1]} is kept" in str(caught.value)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert f"update-{newest[0] + 1:06d}.ckpt.diverged" in names and len(names) == (3 if newest[0] > 1 else 2)
    assert not any(".partial" in name for name in names)
    # whatever batch comes next, these weights have a good loss
    for update, path in checkpoint_files(tmp_path / "checkpoints"):
        again = diverging(tiny_world_model(), **critic)
        first = trainer(max_steps=update + 1, enable_checkpointing=False)
        first.fit(again, datamodule=data(), ckpt_path=path, weights_only=True)
        assert again.update_judge.good == 1


@pytest.mark.filterwarnings("ignore:train/loss is")
def test_one_checkpoint_is_set_aside_at_most_however_often_a_bad_run_is_started(
    tiny_world_model, data, trainer, tmp_path
) -> None:
    folder = tmp_path / "checkpoints"
    module = diverging(tiny_world_model(), learning_rate=1e-4)
    good = trainer(max_steps=3, callbacks=[Checkpoints(1, keep=3)], enable_checkpointing=True)
    good.fit(module, datamodule=data())
    for _ in range(3):
        found = latest_checkpoint(folder)
        assert found is not None
        again = diverging(tiny_world_model(), loss_limit=1e-6, max_bad_updates=0)  # the data are bad now, say
        run = trainer(max_steps=9, callbacks=[Checkpoints(1, keep=3)], enable_checkpointing=True)
        with pytest.raises(NonFiniteLossError, match=r"update-000002.ckpt is kept"):
            run.fit(again, datamodule=data(), ckpt_path=found[1], weights_only=True)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["update-000001.ckpt", "update-000002.ckpt", "update-000003.ckpt.diverged"]
    again = diverging(tiny_world_model(), learning_rate=1e-4)
    run = trainer(max_steps=5, callbacks=[Checkpoints(1, keep=3)], enable_checkpointing=True)
    run.fit(again, datamodule=data(), ckpt_path=folder / names[1], weights_only=True)
    assert sorted(path.name for path in folder.iterdir()) == [f"update-{update:06d}.ckpt" for update in (3, 4, 5)]


@pytest.mark.filterwarnings("ignore:train/loss is")
def test_what_is_due_is_saved_after_the_next_good_update(
    tiny_world_model, data, trainer, monkeypatch, tmp_path
) -> None:
    module = module_of(tiny_world_model(action_dim=3, reward=True), max_bad_updates=3)
    spoil(module, monkeypatch, lambda batch: batch in (1, 2))
    fit = trainer(max_steps=5, callbacks=[Checkpoints(2, keep=9)], enable_checkpointing=True, limit_val_batches=0)
    fit.fit(module, datamodule=data())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"update-{update:06d}.ckpt" for update in (4, 5)
    ]


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
