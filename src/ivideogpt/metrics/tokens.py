"""Metrics of tokens as torchmetrics: perplexity of the transformer's predictions, and use of a codebook.

B clips, L tokens a clip, K entries of a codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from ivideogpt.layout import IGNORE_INDEX


class TokenPerplexity(Metric):
    """Perplexity of teacher-forced next-token predictions, over all tokens that have a label.

    Args:
        left_out: ids that do not count, such as the slot token between frames, which a rollout never has to guess.
        kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    loss: Tensor
    tokens: Tensor

    def __init__(self, left_out: Sequence[int] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.left_out = tuple(left_out)
        self.add_state("loss", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds the predictions of a batch, which are shifted by one as in the training's loss.

        Args:
            logits: (B, L, vocabulary).
            labels: (B, L), -100 where there is none.

        Raises:
            ValueError: if shapes do not fit, a label is outside of the vocabulary, or a logit is NaN.
        """
        if logits.ndim != 3 or labels.shape != logits.shape[:2]:
            raise ValueError(
                f"logits must be (B, L, vocabulary) and labels (B, L), got {tuple(logits.shape)} and "
                f"{tuple(labels.shape)}"
            )
        wanted = labels != IGNORE_INDEX
        if bool((wanted & ((labels < 0) | (labels >= logits.shape[2]))).any()):
            raise ValueError(f"labels must be {IGNORE_INDEX} or below the {logits.shape[2]} ids of the vocabulary")
        for token in self.left_out:
            wanted = wanted & (labels != token)
        shifted = labels.masked_fill(~wanted, IGNORE_INDEX)[:, 1:]
        for row, label in zip(logits[:, :-1], shifted, strict=True):  # a clip at a time: 50 MB of float32 for 64-small
            loss = F.cross_entropy(row.float(), label, ignore_index=IGNORE_INDEX, reduction="none").double().sum()
            if not bool(torch.isfinite(loss)):
                raise ValueError("logits hold values that are not finite (NaN or infinity): the weights are broken")
            self.loss = self.loss + loss.to(self.loss.device)
        self.tokens = self.tokens + (shifted != IGNORE_INDEX).sum().to(self.tokens.device)

    def compute(self) -> dict[str, Tensor]:
        """``perplexity``, ``loss`` (its logarithm, nats a token) and ``tokens``, which counts them.

        Raises:
            ValueError: if there was no token.
        """
        if not int(self.tokens):
            raise ValueError("no token was measured: there was no label")
        loss = self.loss / self.tokens
        return {"perplexity": loss.exp(), "loss": loss, "tokens": self.tokens.clone()}


class CodebookUse(Metric):
    """How much of a codebook is chosen.

    Args:
        codebook_size: K.
        kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    counts: Tensor

    def __init__(self, codebook_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(codebook_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Adds choices (...), each an entry from 0 to K - 1.

        Raises:
            ValueError: if one is outside.
        """
        size = len(self.counts)
        if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < size):
            raise ValueError(
                f"indices must be entries of a codebook of {size}, got {int(indices.min())} to {int(indices.max())}"
            )
        self.counts = self.counts + torch.bincount(indices.flatten(), minlength=size).to(self.counts.device)

    def compute(self) -> dict[str, Tensor]:
        """``used``: fraction of entries that were chosen at all; ``perplexity``: the effective number of entries.

        Raises:
            ValueError: if nothing was chosen.
        """
        if not bool(self.counts.any()):
            raise ValueError("no choice was counted: update() was never called")
        perplexity, used = codebook_usage(self.counts)
        return {"perplexity": torch.tensor(perplexity), "used": torch.tensor(used)}


def codebook_usage(counts: Tensor) -> tuple[float, float]:
    """Perplexity (effective number of entries) and used fraction of a codebook with choice ``counts`` (K,)."""
    shares = counts.double() / counts.sum().clamp_min(1)
    entropy = -(shares * torch.log(shares.clamp_min(1e-12))).sum()
    return float(torch.exp(entropy)), float((counts > 0).double().mean())
