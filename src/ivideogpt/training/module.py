"""TrainingModule: what the training tasks share - optimizer, schedule, gradient clip, frozen parts, finite losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from warnings import warn

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ivideogpt.training.optim import Schedule, adamw, scheduler
from ivideogpt.training.sharding import gather, is_sharded, scatter, shard


class NonFiniteLossError(ValueError):
    """A training loss is NaN, infinite or above its limit."""


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
        max_bad_updates: updates in a row whose loss is not finite, or above ``loss_limit``, and that are left out
            before the training stops; 0 stops at the first.
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
        self.max_bad_updates, self.loss_limit = max_bad_updates, loss_limit
        self._bad_in_a_row, self._is_bad = 0, False
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
            raise ValueError(f"freeze: {name!r} is no part of {' or '.join(parts)}")
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
            raise ValueError("averaged weights (EMA) need whole weights on each process: use strategy=ddp")
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
        """Learning-rate schedule of ``optimizer`` from update ``start`` to the trainer's last one."""
        total = int(self.trainer.estimated_stepping_batches)
        return scheduler(optimizer, max(total - start, 1), self.warmup_updates, self.schedule)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradient norm to ``gradient_clip``, or as the trainer says; drops gradients of a bad loss."""
        if self._is_bad:
            optimizer.zero_grad(set_to_none=True)  # an optimizer passes over parameters without gradients
            self._is_bad = False
            return
        if getattr(optimizer, "optimizer", optimizer) is self.trainer.optimizers[0]:
            self._log_update(optimizer)
        if gradient_clip_val is None and self.gradient_clip is not None:
            gradient_clip_val, gradient_clip_algorithm = self.gradient_clip, "norm"
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def check_finite(self, loss: Tensor, batch: Mapping[str, Any]) -> bool:
        """Whether ``loss`` may change the weights; if not, on any process, the gradients of this update are dropped.

        Raises:
            NonFiniteLossError: after ``max_bad_updates`` such updates in a row, naming the update and the clips.
        """
        limit = float("inf") if self.loss_limit is None else self.loss_limit
        value = loss.detach()
        bad = not bool(torch.isfinite(value) & (value <= limit))
        if self.trainer.world_size > 1:
            bad = bool(self.trainer.strategy.reduce_boolean_decision(bad, all=False))
        if not bad:
            self._bad_in_a_row = 0
            return True
        self._is_bad = True
        self._bad_in_a_row += 1
        above = "" if self.loss_limit is None else f" (loss_limit is {self.loss_limit:g})"
        where = f"update {self.global_step}, in the batch of clips {list(batch.get('key', ['(no keys)']))}"
        process = f" on process {self.global_rank}" if self.trainer.world_size > 1 else ""
        what = f"train/loss is {loss.item()}{above}{process} at {where}"
        if self._bad_in_a_row > self.max_bad_updates:
            raise NonFiniteLossError(
                f"{what}. The last checkpoint is kept. A lower learning_rate, a longer warm-up or float32 "
                f"(trainer.precision=32-true) usually helps"
            )
        warn(f"{what}: left out, {self._bad_in_a_row} of at most {self.max_bad_updates} in a row", stacklevel=2)
        return False

    def _log_update(self, optimizer: Optimizer) -> None:
        """Logs the norm of the gradients, before they are clipped, and the learning rate, where the trainer logs."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.trainer.logger is None or not every or (self.global_step + 1) % every:
            return
        groups = optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of sharded weights
        self.log_dict({"train/gradient_norm": norm, "train/learning_rate": groups[0]["lr"]})

    def _is_frozen(self, key: str) -> bool:
        return any(key.startswith(f"{name}.") for name in self._frozen)
