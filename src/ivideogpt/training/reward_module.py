"""RewardModule: trains a reward head alone, on the hidden states of a frozen transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ivideogpt.models.reward_head import RewardHead
from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer
from ivideogpt.training.optim import Schedule
from ivideogpt.training.transformer_module import TeacherForced, TransformerModule


class RewardModule(TransformerModule):
    """Reward regression with transformer and tokenizer frozen; loss = MSE of transformed rewards.

    Args:
        reward_head: the model that is trained.
        transformer: frozen.
        tokenizer: frozen.
        learning_rate: peak learning rate.
        schedule: ``"cosine"`` or ``"constant"``.
        warmup_updates: updates of linear warm-up.
        weight_decay: decay of the head's matrix.
        betas: AdamW's.
        gradient_clip: largest gradient norm.
        action_mean: subtracted from the actions (A,); 0 if None.
        action_std: what the actions are divided by (A,); 1 if None.
        max_bad_updates: updates in a row with a loss that is not finite that are left out before the training stops.
        loss_limit: a larger loss counts as one that is not finite.
    """

    def __init__(
        self,
        reward_head: RewardHead,
        transformer: Transformer,
        tokenizer: CompressiveTokenizer,
        learning_rate: float = 1e-3,
        schedule: Schedule = "cosine",
        warmup_updates: int = 0,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        gradient_clip: float | None = 1.0,
        action_mean: Sequence[float] | None = None,
        action_std: Sequence[float] | None = None,
        max_bad_updates: int = 0,
        loss_limit: float | None = None,
    ) -> None:
        super().__init__(
            transformer=transformer,
            tokenizer=tokenizer,
            reward_head=reward_head,
            learning_rate=learning_rate,
            schedule=schedule,
            warmup_updates=warmup_updates,
            weight_decay=weight_decay,
            betas=betas,
            gradient_clip=gradient_clip,
            freeze=("transformer",),
            action_mean=action_mean,
            action_std=action_std,
            max_bad_updates=max_bad_updates,
            loss_limit=loss_limit,
        )

    def predict_clip(self, batch: dict[str, Any]) -> TeacherForced:
        """Hidden states of the frozen transformer."""
        with torch.no_grad():
            return super().predict_clip(batch)

    def losses(self, out: TeacherForced, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The reward loss alone."""
        assert self.reward_head is not None
        loss = self.reward_loss(self.reward_head(out.reward_hidden), batch)
        return {"reward_loss": loss, "loss": loss}
