"""TrainingModule: what the training tasks share - optimizer, schedule, gradient clip, frozen parts, finite losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_
from torch.optim import Optimizer

from ivideogpt.models.processor import has_slow_bfloat16
from ivideogpt.training.bad_updates import NonFiniteLossError, UpdateJudge
from ivideogpt.training.optim import Schedule, adamw, scheduler, schedules_of, use_settings
from ivideogpt.training.sharding import gather, gradient_norm, is_sharded, local, scatter, shard

NO_AVERAGES = "averaged weights (EMA) need whole weights on each process: use strategy=ddp"
"""What is said where weights are spread over processes and averaged."""

SLOW_BFLOAT16 = (
    "trainer.precision={}: this processor has no instructions for products of bfloat16 (AVX-512 BF16 or AMX), and "
    "computes them several times slower than those of float32; trainer.precision=32-true is the fast one here"
)
"""What is said where a training on a CPU would be slowed down by what makes it faster elsewhere."""


class TrainingModule(LightningModule):
    """Base of the training tasks.

    Args:
        learning_rate: peak learning rate.
        schedule: ``"cosine"`` down to 0 at the last update, or ``"constant"``.
        warmup_updates: updates of linear warm-up.
        weight_decay: decay of matrices and kernels.
        betas: AdamW's.
        gradient_clip: largest gradient norm; None does not clip. It stands here and not with the trainer, because
            the trainer refuses to clip where there is a discriminator.
        max_bad_updates: updates in a row that are left out before the training stops, because a loss of theirs is not
            finite or above ``loss_limit``, or their gradients are not finite; 0 stops at the first.
        loss_limit: a larger loss counts as one that is not finite; None for none.
    """

    def __init__(
        self,
        learning_rate: float,
        schedule: Schedule,
        warmup_updates: int,
        weight_decay: float,
        betas: tuple[float, float],
        gradient_clip: float | None,
        max_bad_updates: int = 0,
        loss_limit: float | None = None,
    ) -> None:
        super().__init__()
        if learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {learning_rate!r}")
        if warmup_updates < 0:
            raise ValueError(f"warmup_updates must not be negative, got {warmup_updates!r}")
        self.learning_rate = learning_rate
        self.schedule: Schedule = schedule
        self.warmup_updates = warmup_updates
        self.weight_decay = weight_decay
        self.betas = betas
        if max_bad_updates < 0:
            raise ValueError(f"max_bad_updates must not be negative, got {max_bad_updates!r}")
        self.gradient_clip = gradient_clip
        self.update_judge = UpdateJudge(max_bad_updates, loss_limit)
        self._frozen: list[str] = []

    def freeze_part(self, name: str) -> None:
        """Freezes the submodule ``name``: no gradients, always in eval mode, not in the checkpoints."""
        part = self.get_submodule(name)
        part.requires_grad_(False)
        part.eval()
        self._frozen.append(name)

    def freeze_by_name(self, name: str, parts: Sequence[str]) -> None:
        """Freezes what a user names: one of the ``parts`` of this module, or a submodule of one, as ``part.submodule``.

        Raises:
            ValueError: if there is none, naming those that there are.
        """
        top = name.partition(".")[0]
        if top not in parts or getattr(self, top) is None:
            raise ValueError(
                f"freeze: {name!r} is no part of the {' or the '.join(part.replace('_', ' ') for part in parts)}"
            )
        try:
            self.freeze_part(name)
        except AttributeError:
            children = sorted(f"{top}.{child}" for child, _ in getattr(self, top).named_children())
            raise ValueError(f"freeze: there is no {name!r}; parts are {[top, *children]}") from None

    def trained_parts(self) -> list[nn.Module]:
        """Submodules that the optimizer trains."""
        return [part for name, part in self.named_children() if name not in self._frozen]

    def configure_model(self) -> None:
        """Spreads the trained parts over the processes where the trainer's strategy does that.

        Raises:
            ValueError: if a part cannot be trained in that way.
        """
        mesh = self._device_mesh
        if mesh is None or is_sharded(self):
            return
        if any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(NO_AVERAGES)
        self.check_shardable()
        dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        parts = [part for part in self.trained_parts() if any(p.requires_grad for p in part.parameters())]
        shard(parts, mesh["data_parallel"], dtype)

    def check_shardable(self) -> None:
        """Raises ValueError where a setting does not go with weights that are spread over processes."""

    def on_validation_start(self) -> None:
        """Gathers weights that are spread over processes."""
        gather(self)

    def on_validation_end(self) -> None:
        """Spreads them again."""
        scatter(self)

    def on_fit_start(self) -> None:
        """Switches to training mode: a model that was loaded comes in eval mode, and Lightning leaves it there."""
        self.train()
        self.update_judge.restart()
        precision = str(self.trainer.precision)
        if precision.startswith("bf16") and self.device.type == "cpu" and has_slow_bfloat16():
            rank_zero_warn(SLOW_BFLOAT16.format(precision))

    def on_train_start(self) -> None:
        """Trains with the settings of this start: a checkpoint brings back rates and decays of the one before."""
        if self.trainer.ckpt_path is not None:
            schedules: Any = [config.scheduler for config in self.trainer.lr_scheduler_configs]
            use_settings(schedules, schedules_of(self.configure_optimizers()))

    def on_train_end(self) -> None:
        """Refuses to end with weights whose loss is bad.

        Raises:
            NonFiniteLossError: if the last update was left out.
        """
        bad = self.update_judge.bad_in_a_row
        if bad:
            raise NonFiniteLossError(
                f"bad updates in a row at the end of the training, update {self.global_step}: {bad}. They were left "
                f"out (see the warnings), but the weights may be what is bad. If it is only these clips, "
                f"trainer.max_steps={self.global_step + 1} with on_change=continue ends on others"
            )

    def train(self, mode: bool = True) -> TrainingModule:
        """Switches to training mode, frozen parts left out."""
        super().train(mode)
        for name in self._frozen:
            self.get_submodule(name).eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """State of everything but the frozen parts, which never change."""
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not self._is_frozen(key)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what :meth:`state_dict` gave; strict, the frozen parts staying as they are."""
        frozen = {key: value for key, value in super().state_dict().items() if self._is_frozen(key)}
        return super().load_state_dict({**state_dict, **frozen}, strict=strict, assign=assign)

    def configure_optimizers(self) -> Any:
        """AdamW with its schedule over the trainer's number of updates."""
        optimizer = adamw(self.trained_parts(), self.learning_rate, self.weight_decay, self.betas)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule_of(optimizer), "interval": "step"}}

    def schedule_of(self, optimizer: Optimizer, start: int = 0) -> Any:
        """Learning-rate schedule of ``optimizer`` from update ``start`` to the trainer's last one.

        Raises:
            ValueError: for a cosine, if the trainer goes by time and so has no last update.
        """
        updates = self.trainer.estimated_stepping_batches
        if math.isinf(updates) and self.schedule == "cosine":
            raise ValueError("a cosine schedule needs to know the last update: give max_steps, or schedule=constant")
        total = start if math.isinf(updates) else int(updates)
        return scheduler(optimizer, max(total - start, 1), self.warmup_updates, self.schedule)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Judges the update of ``optimizer`` and clips its gradients, see :meth:`finish_gradients`."""
        self.finish_gradients([optimizer], gradient_clip_val, gradient_clip_algorithm)

    def note_loss(self, loss: Tensor, batch: Mapping[str, Any]) -> None:
        """Remembers a loss of the update under way; it is judged when the gradients are complete."""
        self.update_judge.note(loss, batch.get("key", ["(no keys)"]))

    def finish_gradients(
        self, optimizers: Sequence[Optimizer], clip: float | None = None, algorithm: str | None = None
    ) -> bool:
        """Clips the gradient norm of each optimizer to ``gradient_clip``, or as the trainer says.

        All gradients are dropped where one of them or a loss of this update is bad, on any process.

        Returns:
            Whether the update is good.

        Raises:
            NonFiniteLossError: after ``max_bad_updates`` bad ones in a row, naming the update and the clips.
        """
        parameters = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
        norms = [gradient_norm(each) for each in parameters]
        # float16's gradients overflow now and then: its scaler finds that and leaves the step out itself
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        if not self.update_judge.judge([] if scaled else [local(norm) for norm in norms], self.trainer):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)  # an optimizer passes over parameters without gradients
            return False
        if clip is None and self.gradient_clip is not None:
            clip, algorithm = self.gradient_clip, "norm"
        for optimizer, each, norm in zip(optimizers, parameters, norms, strict=True):
            if getattr(optimizer, "optimizer", optimizer) is self.trainer.optimizers[0]:
                self._log_update(optimizer, local(norm))
            if clip and algorithm == "norm" and not scaled:
                clip_grads_with_norm_(each, clip, norm)
            else:
                self.clip_gradients(optimizer, clip, algorithm)
        return True

    def log_validation(self, metrics: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Logs the means of a batch of held-out clips, for a mean over the clips of all processes.

        A batch with an empty ``key`` takes part, and does not count: that of a process for which there is no clip.
        """
        # a float: the processes' counts are averaged, and Lightning cuts off what is behind the point of an int
        clips: Any = float(len(batch.get("key", next(iter(batch.values())))))
        self.log_dict(metrics, batch_size=clips, sync_dist=True)

    def _log_update(self, optimizer: Optimizer, norm: Tensor) -> None:
        """Logs the norm of the gradients, before they are clipped, and the learning rate, where the trainer logs."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.trainer.logger is not None and every and (self.global_step + 1) % every == 0:
            self.log_dict({"train/gradient_norm": norm, "train/learning_rate": optimizer.param_groups[0]["lr"]})

    def _is_frozen(self, key: str) -> bool:
        return any(key.startswith(f"{name}.") for name in self._frozen)
