"""Losses of the tokenizer: pixel and perceptual reconstruction, and the hinge losses of the discriminator path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ADVERSARIAL_WEIGHT = 1e4
"""Cap of the adaptive weight, for the updates at which the generator loss hardly reaches the last layer."""


@dataclass
class ReconstructionLoss:
    """Weighted pixel and perceptual loss of frames in [0, 1].

    Args:
        l1_weight: weight of the mean absolute error.
        mse_weight: weight of the mean squared error.
        perceptual_weight: weight of ``perceptual``, which is not called at 0.
    """

    l1_weight: float = 1.0
    mse_weight: float = 0.0
    perceptual_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("l1_weight", "mse_weight", "perceptual_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)!r}")
        if self.l1_weight + self.mse_weight <= 0:
            raise ValueError("a tokenizer cannot learn without a pixel loss: l1_weight and mse_weight are both 0")

    def __call__(
        self, reconstruction: Tensor, frames: Tensor, perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Terms ``l1``, ``mse``, ``perceptual`` (those with a weight) and their weighted sum ``total``.

        Args:
            reconstruction: (..., C, H, W), not clamped.
            frames: (..., C, H, W) in [0, 1].
            perceptual: distance (N,) of frames (N, C, H, W) in [0, 1].
        """
        reconstruction = reconstruction.float()
        terms: dict[str, Tensor] = {}
        total = reconstruction.new_zeros(())
        if self.l1_weight:
            terms["l1"] = F.l1_loss(reconstruction, frames)
            total = total + self.l1_weight * terms["l1"]
        if self.mse_weight:
            terms["mse"] = F.mse_loss(reconstruction, frames)
            total = total + self.mse_weight * terms["mse"]
        if self.perceptual_weight:
            assert perceptual is not None, "a perceptual weight needs the perceptual network"
            distance = perceptual(reconstruction.flatten(0, -4), frames.flatten(0, -4)).mean()
            terms["perceptual"] = distance
            total = total + self.perceptual_weight * distance
        terms["total"] = total
        return terms


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Adversarial loss of the tokenizer: its reconstructions should be taken for real."""
    return -fake_logits.float().mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator."""
    return 0.5 * (F.relu(1.0 - real_logits.float()).mean() + F.relu(1.0 + fake_logits.float()).mean())


def adaptive_weight(
    reconstruction: Tensor,
    adversarial: Tensor,
    last_layers: Sequence[Tensor],
    average: Callable[[Sequence[Tensor]], None] | None = None,
) -> Tensor:
    """Ratio of the two losses' gradient norms at the decoders' last layers (Esser et al., 2021, equation 7).

    It keeps the adversarial loss from drowning the reconstruction. Detached, capped.

    Args:
        reconstruction: loss of the pixels.
        adversarial: loss of the generator.
        last_layers: weights of the decoders' last layers.
        average: replaces gradients by their mean over the processes of a distributed run, whose batch is one.
    """
    norms = []
    for loss in (reconstruction, adversarial):
        gradients = torch.autograd.grad(loss, list(last_layers), retain_graph=True)
        if average is not None:
            average(gradients)
        norms.append(torch.sqrt(sum((g.float().pow(2).sum() for g in gradients), torch.zeros((), device=loss.device))))
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, MAX_ADVERSARIAL_WEIGHT).detach()
