"""Tests of TokenizerModule: the loss of the published recipes, the discriminator path, codebook restarts, faults."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import save_file

from ivideogpt.metrics.networks import WEIGHT_FILES
from ivideogpt.models.discriminator import PatchDiscriminator
from ivideogpt.training import TokenizerModule
from ivideogpt.training.bad_updates import NonFiniteLossError
from ivideogpt.training.checkpoints import Checkpoints


@pytest.fixture
def tokenizer(tiny_world_model):
    return tiny_world_model().tokenizer.train()


def parameters_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


def test_loss_is_that_of_the_published_recipes(tokenizer) -> None:
    module = TokenizerModule(tokenizer.eval(), perceptual_weight=0.0)
    context, future = module.split(torch.rand(2, 5, 3, 32, 32))
    output = tokenizer(context, future)
    terms = module.losses(output, context, future)
    expected = (
        F.l1_loss(output.future_reconstruction, future)
        + F.l1_loss(output.context_reconstruction, context)
        + output.commitment_loss
        + output.dynamics_commitment_loss
    )
    torch.testing.assert_close(terms["loss"], expected)


def test_training_lowers_the_loss(tokenizer, data, trainer) -> None:
    module = TokenizerModule(tokenizer, learning_rate=3e-3, perceptual_weight=0.0, codebook_restart=4)
    batch = next(iter(_loader(data())))
    module.eval()
    with torch.no_grad():
        before = module.losses(tokenizer(*module.split(batch)), *module.split(batch))["reconstruction"]
    run = trainer(max_steps=12)
    run.fit(module, datamodule=data())
    module.eval()
    with torch.no_grad():
        after = module.losses(tokenizer(*module.split(batch)), *module.split(batch))["reconstruction"]
    assert after < 0.8 * before
    assert {"train/loss", "train/future_l1", "train/context_l1", "train/restarted"} <= run.callback_metrics.keys()
    assert {"val/loss", "val/psnr", "val/context_psnr"} <= run.callback_metrics.keys()


def _loader(module):
    module.setup("fit")
    for batch in module.val_dataloader():
        yield batch["video"].float() / 255


def test_discriminator_starts_at_its_update_and_an_update_is_a_generator_step(tokenizer, data, trainer) -> None:
    critic = PatchDiscriminator(base_channels=8, num_layers=2)
    module = TokenizerModule(tokenizer, perceptual_weight=0.0, discriminator=critic, discriminator_start=2)
    assert not module.automatic_optimization
    start, critic_start = parameters_of(tokenizer), parameters_of(critic)
    trainer(max_steps=2).fit(module, datamodule=data())
    assert changed(tokenizer, start)
    assert not changed(critic, critic_start)
    run = trainer(max_steps=4)
    fresh = TokenizerModule(tokenizer, perceptual_weight=0.0, discriminator=critic, discriminator_start=2)
    run.fit(fresh, datamodule=data())
    assert run.global_step == 4  # the critic's two steps do not count
    assert changed(critic, critic_start)
    metrics = run.callback_metrics
    assert {"train/generator", "train/discriminator", "train/adversarial_weight"} <= metrics.keys()
    assert 0 < metrics["train/adversarial_weight"] <= 0.8 * 1e4
    assert [config.scheduler.last_epoch for config in run.lr_scheduler_configs] == [4, 2]


def test_discriminator_path_clips_the_gradients_of_both(tokenizer, data, trainer, monkeypatch) -> None:
    critic = PatchDiscriminator(base_channels=8, num_layers=2)
    module = TokenizerModule(tokenizer, perceptual_weight=0.0, discriminator=critic, gradient_clip=1e-3)
    norms = []
    finish = module.finish_gradients

    def finish_and_measure(optimizers):
        assert finish(optimizers)
        for optimizer in optimizers:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    monkeypatch.setattr(module, "finish_gradients", finish_and_measure)
    trainer(max_steps=1).fit(module, datamodule=data())
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_adversarial_update_leaves_no_gradient_of_the_tokenizer_in_the_critic(tokenizer, data, trainer) -> None:
    critic = PatchDiscriminator(base_channels=8, num_layers=2)
    module = TokenizerModule(tokenizer, perceptual_weight=0.0, discriminator=critic)
    trainer(max_steps=1, gradient_clip_val=None).fit(module, datamodule=data())
    assert all(parameter.requires_grad for parameter in critic.parameters())


def test_a_clip_without_a_future_frame_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="2 frames has no future frame after 2 context frames"):
        TokenizerModule(tokenizer, perceptual_weight=0.0).split(torch.rand(1, 2, 3, 32, 32))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tokenizer, data, trainer, tmp_path) -> None:
    class Poisoned(TokenizerModule):
        def losses(self, *args):
            terms = super().losses(*args)
            return {**terms, "loss": terms["loss"] * (float("nan") if self.global_step == 3 else 1.0)}

    module = Poisoned(tokenizer, perceptual_weight=0.0)
    run = trainer(max_steps=9, callbacks=[Checkpoints(every_n_updates=2)], enable_checkpointing=True)
    with pytest.raises(NonFiniteLossError, match=r"nan at update 3, in the batch of clips \['square-00\d', 'square-"):
        run.fit(module, datamodule=data())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["update-000002.ckpt"]


def test_wrong_settings_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="learning_rate must be positive, got 0"):
        TokenizerModule(tokenizer, learning_rate=0)
    with pytest.raises(ValueError, match="warmup_updates must not be negative, got -1"):
        TokenizerModule(tokenizer, warmup_updates=-1)


def test_perceptual_loss_is_loaded_from_this_disk_and_has_a_gradient(
    tokenizer, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        layers = torchvision.models.vgg16(weights=None).features.state_dict()
    save_file({f"features.{k}": torch.randn(v.shape, generator=generator) * 0.05 for k, v in layers.items()}, file)
    known = dataclasses.replace(WEIGHT_FILES["vgg"][0], sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(WEIGHT_FILES, "vgg", (known,))
    monkeypatch.setenv("IVIDEOGPT_NETWORKS", str(tmp_path))
    module = TokenizerModule(tokenizer.eval(), perceptual_weight=1.0)
    module.configure_model()
    assert not any(name.startswith("perceptual") for name, p in module.named_parameters() if p.requires_grad)
    context, future = module.split(torch.rand(2, 5, 3, 32, 32))
    terms = module.losses(tokenizer(context, future), context, future)
    assert float(terms["future_perceptual"].detach()) > 0
    terms["loss"].backward()
    assert any(parameter.grad is not None for parameter in tokenizer.parameters())
