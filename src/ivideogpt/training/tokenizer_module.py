"""TokenizerModule: trains a compressive tokenizer to reconstruct clips (arXiv 2405.15223, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from ivideogpt.metrics.lpips import LPIPS
from ivideogpt.metrics.video import psnr
from ivideogpt.models.discriminator import PatchDiscriminator
from ivideogpt.models.tokenizer import CompressiveTokenizer, TokenizerOutput
from ivideogpt.training.codebook import CodebookRestart
from ivideogpt.training.losses import ReconstructionLoss, adaptive_weight, discriminator_loss, generator_loss
from ivideogpt.training.module import TrainingModule
from ivideogpt.training.optim import Schedule, adamw, average_over_processes, gradients_of


class TokenizerModule(TrainingModule):
    """Tokenizer training: reconstruction of future and of context frames, commitment, and an optional discriminator.

    loss = rec(future) + rec(context) + both commitment losses [+ discriminator_weight * adaptive * generator loss],
    rec = l1_weight L1 + mse_weight MSE + perceptual_weight LPIPS(VGG).

    Args:
        tokenizer: the model; its ``context_length`` says how many frames of a clip are context.
        learning_rate: peak learning rate (5e-4 in the published recipes).
        schedule: ``"constant"`` or ``"cosine"``.
        warmup_updates: updates of linear warm-up.
        weight_decay: decay of matrices and kernels.
        betas: AdamW's.
        gradient_clip: largest gradient norm.
        l1_weight: weight of the mean absolute error.
        mse_weight: weight of the mean squared error.
        perceptual_weight: weight of LPIPS; 0 does without, and then nothing is downloaded.
        commitment_weight: weight of both commitment losses.
        discriminator: critic of the frames; with one, optimization is manual and half of the work is the critic's.
        discriminator_start: update at which the critic begins to count.
        discriminator_weight: factor of the adaptive weight of the generator loss.
        discriminator_learning_rate: that of the critic; ``learning_rate`` if None.
        codebook_restart: re-seeds codebook entries unused for this many updates; None (as published) never does.
        activation_checkpointing: computes norms and activations again in the backward pass in place of keeping them:
            the same gradients, a third to a half of the memory for activations saved.
        compile: compiles the model (``torch.compile``), which decides itself what to compute again: the first update
            takes minutes.
        accumulate: batches of an update with a discriminator; without, use the trainer's `accumulate_grad_batches`.
        max_bad_updates: updates in a row with a loss that is not finite that are left out before the training stops.
        loss_limit: a larger loss counts as one that is not finite.
        freeze: names of submodules that stay as they are, such as ``"tokenizer.encoder"``.
    """

    def __init__(
        self,
        tokenizer: CompressiveTokenizer,
        learning_rate: float = 5e-4,
        schedule: Schedule = "constant",
        warmup_updates: int = 0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        gradient_clip: float | None = 1.0,
        l1_weight: float = 1.0,
        mse_weight: float = 0.0,
        perceptual_weight: float = 1.0,
        commitment_weight: float = 1.0,
        discriminator: PatchDiscriminator | None = None,
        discriminator_start: int = 0,
        discriminator_weight: float = 0.8,
        discriminator_learning_rate: float | None = None,
        codebook_restart: int | None = None,
        activation_checkpointing: bool = True,
        compile: bool = False,  # noqa: A002
        accumulate: int = 1,
        max_bad_updates: int = 0,
        loss_limit: float | None = None,
        freeze: Sequence[str] = (),
    ) -> None:
        super().__init__(
            learning_rate, schedule, warmup_updates, weight_decay, betas, gradient_clip, max_bad_updates, loss_limit
        )
        self.tokenizer = tokenizer
        self.tokenizer.compiles = compile
        self.tokenizer.save_memory(activation_checkpointing and not compile)
        self.reconstruction = ReconstructionLoss(l1_weight, mse_weight, perceptual_weight)
        self.commitment_weight = commitment_weight
        self.discriminator = discriminator
        self.discriminator_start = discriminator_start
        self.discriminator_weight = discriminator_weight
        self.discriminator_learning_rate = discriminator_learning_rate or learning_rate
        self.automatic_optimization = discriminator is None
        if accumulate < 1 or (accumulate > 1 and discriminator is None):
            raise ValueError(
                f"accumulate is {accumulate}: it is for a tokenizer with a discriminator; without one set "
                f"trainer.accumulate_grad_batches"
            )
        self.accumulate, self._micro_batch = accumulate, 0
        self.restarts: nn.ModuleList | None = None
        if codebook_restart is not None:
            config = tokenizer.config
            sizes = (config.codebook_size, config.dynamics_codebook_size)
            self.restarts = nn.ModuleList(CodebookRestart(size, codebook_restart) for size in sizes)
        for name in freeze:
            self.freeze_by_name(name, ("tokenizer",))
        self._choices: list[tuple[Tensor, Tensor]] | None = None
        self._restarted = (0.0, 0.0)

    def trained_parts(self) -> list[nn.Module]:
        """The tokenizer; the discriminator has an optimizer of its own."""
        return [self.tokenizer]

    @property
    def uses_perceptual_network(self) -> bool:
        """Whether the loss has a perceptual term."""
        return bool(self.reconstruction.perceptual_weight)

    def configure_model(self) -> None:
        """Loads the perceptual network, which is the only thing here that may need the network."""
        if self.reconstruction.perceptual_weight and not hasattr(self, "perceptual"):
            self.perceptual = LPIPS.pretrained()
            self.freeze_part("perceptual")
        if self._device_mesh is None:  # what is spread over processes must lie in its first order
            self.to(memory_format=torch.channels_last)
        super().configure_model()

    def check_shardable(self) -> None:
        """Refuses what changes or reads single weights outside of the forward pass."""
        for name, value in (("discriminator", self.discriminator), ("codebook_restart", self.restarts)):
            if value is not None:
                raise ValueError(
                    f"a tokenizer with {name} cannot be trained with FullyShardedStrategy; it fits on one GPU, so use "
                    f"strategy=ddp"
                )

    def split(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Context and future frames of ``video`` (B, T, C, H, W).

        Raises:
            ValueError: if the clip has no future frame.
        """
        context_length = self.tokenizer.context_length
        if video.shape[1] <= context_length:
            raise ValueError(
                f"a clip of {video.shape[1]} frames has no future frame after {context_length} context frames: "
                f"raise the data's segment_length"
            )
        return video[:, :context_length], video[:, context_length:]

    def losses(self, output: TokenizerOutput, context: Tensor, future: Tensor) -> dict[str, Tensor]:
        """Named loss terms, ``loss`` their weighted sum (without the adversarial one)."""
        perceptual = getattr(self, "perceptual", None)
        future_terms = self.reconstruction(output.future_reconstruction, future, perceptual)
        context_terms = self.reconstruction(output.context_reconstruction, context, perceptual)
        terms = {f"future_{name}": value for name, value in future_terms.items() if name != "total"}
        terms |= {f"context_{name}": value for name, value in context_terms.items() if name != "total"}
        terms["commitment"] = output.commitment_loss
        terms["dynamics_commitment"] = output.dynamics_commitment_loss
        terms["reconstruction"] = future_terms["total"] + context_terms["total"]
        commitment = output.commitment_loss + output.dynamics_commitment_loss
        terms["loss"] = terms["reconstruction"] + self.commitment_weight * commitment
        return terms

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """One update of the tokenizer, and of the discriminator where there is one."""
        context, future = self.split(batch["video"])
        output = self.tokenizer(context, future)
        terms = self.losses(output, context, future)
        if self.restarts is not None:
            context_choice = output.context_latents.detach(), output.context_indices
            self._choices = [context_choice, (output.dynamics_latents.detach(), output.dynamics_indices)]
        if self.automatic_optimization:
            self.note_loss(terms["loss"], batch)
        else:
            terms |= self._adversarial_update(terms, output, context, future, batch)
        self.log_dict({f"train/{name}": value.detach() for name, value in terms.items() if name != "loss"})
        self.log("train/loss", terms["loss"].detach(), prog_bar=True)
        return terms["loss"] if self.automatic_optimization else None

    def _adversarial_update(
        self, terms: dict[str, Tensor], output: TokenizerOutput, context: Tensor, future: Tensor, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        assert self.discriminator is not None
        optimizer, critic_optimizer = self.optimizers()  # type: ignore[attr-defined]
        schedule, critic_schedule = self.lr_schedulers()  # type: ignore[misc]
        active = self.global_step >= self.discriminator_start
        extra: dict[str, Tensor] = {"loss": terms["loss"]}
        real = torch.cat([context, future], dim=1).flatten(0, 1)
        fake = torch.cat([output.context_reconstruction, output.future_reconstruction], dim=1).flatten(0, 1)
        if active:
            self.discriminator.requires_grad_(False)
            adversarial = generator_loss(self.discriminator(fake))
            last_layers = (self.tokenizer.decoder.conv_out.weight, self.tokenizer.cond_decoder.conv_out.weight)
            ratio = adaptive_weight(terms["reconstruction"], adversarial, last_layers, self._average)
            weight = self.discriminator_weight * ratio
            self.discriminator.requires_grad_(True)
            extra |= {"generator": adversarial, "adversarial_weight": weight}
            extra["loss"] = terms["loss"] + weight * adversarial
        self.note_loss(extra["loss"], batch)
        first, last = self._micro_batch == 0, self._micro_batch == self.accumulate - 1
        self._micro_batch = 0 if last else self._micro_batch + 1
        if first:
            optimizer.zero_grad()
        self._accumulate_gradients(extra["loss"])
        if active:
            if first:
                critic_optimizer.zero_grad()
            critic = discriminator_loss(self.discriminator(real), self.discriminator(fake.detach()))
            self.note_loss(critic, batch)
            extra["discriminator"] = critic
            self._accumulate_gradients(critic)
        if last:
            # both networks pass over a bad update, or neither
            optimizers = [each.optimizer for each in ([optimizer, critic_optimizer] if active else [optimizer])]
            for each in optimizers:
                self._average(gradients_of(each))
            self.finish_gradients(optimizers)
            if active:
                # stepped below Lightning's wrapper, which would count it as one more update
                critic_optimizer.optimizer.step()
                critic_schedule.step()
            optimizer.step()
            self._restart_codebooks(optimizer)
            schedule.step()
        return extra

    def _accumulate_gradients(self, loss: Tensor) -> None:
        """Adds the gradients of a batch; those of other processes come in once an update, in :meth:`_average`.

        DDP would wait in each backward pass for the gradients of both networks, of which every pass has one only.
        """
        strategy = self.trainer.strategy
        blocked = strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
        with blocked:
            self.manual_backward(loss / self.accumulate)

    def _average(self, tensors: Sequence[Tensor]) -> None:
        if self.trainer.world_size > 1:
            average_over_processes(tensors)

    def on_validation_model_zero_grad(self) -> None:
        """Keeps the gradients of an update that a validation comes into."""
        if self._micro_batch == 0:
            super().on_validation_model_zero_grad()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Updates the weights, then re-seeds idle codebook entries (before any checkpoint of this update)."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._restart_codebooks(optimizer)

    def _restart_codebooks(self, optimizer: Any) -> None:
        if self.restarts is None:
            return
        if self._choices is not None and not self.update_judge.bad_in_a_row:
            self._restarted = self._restart(self.restarts, self._choices, optimizer)
            self._choices = None
        self.log_dict({"train/restarted": self._restarted[0], "train/dynamics_restarted": self._restarted[1]})

    def _restart(self, restarts: nn.ModuleList, choices: Any, optimizer: Any) -> tuple[float, float]:
        """Numbers of re-seeded entries of the two codebooks."""
        quantizers = (self.tokenizer.quantize, self.tokenizer.dynamics_quantize)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # below Lightning's wrapper
        rows = zip(restarts, quantizers, choices, strict=True)
        first, second = [restart(quantizer, *made, optimizer) for restart, quantizer, made in rows]
        return float(first), float(second)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Reconstruction of held-out clips; returns the indices that they chose."""
        context, future = self.split(batch["video"])
        output = self.tokenizer(context, future)
        terms = self.losses(output, context, future)
        logs = {f"val/{name}": value for name, value in terms.items()}
        logs["val/psnr"] = psnr(output.future_reconstruction.float().clamp(0, 1), future).mean()
        logs["val/context_psnr"] = psnr(output.context_reconstruction.float().clamp(0, 1), context).mean()
        self.log_validation(logs, batch)
        return {"context_indices": output.context_indices, "dynamics_indices": output.dynamics_indices}

    def imagine(self, batch: dict[str, Any]) -> Tensor:
        """What the model makes of the clips in ``batch``, (B, T, C, H, W) in [0, 1]: their reconstruction."""
        output = self.tokenizer(*self.split(batch["video"]))
        return torch.cat([output.context_reconstruction, output.future_reconstruction], dim=1).float().clamp(0, 1)

    def configure_optimizers(self) -> Any:
        """One optimizer, and one for the discriminator where there is one."""
        if self.discriminator is None:
            return super().configure_optimizers()
        optimizer = adamw([self.tokenizer], self.learning_rate, self.weight_decay, self.betas)
        critic = adamw([self.discriminator], self.discriminator_learning_rate, 0.0, self.betas)
        # the critic's schedule begins when the critic does
        return [optimizer, critic], [self.schedule_of(optimizer), self.schedule_of(critic, self.discriminator_start)]
