"""Tests of the tokenizer's losses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ivideogpt.training.losses import ReconstructionLoss, adaptive_weight, discriminator_loss, generator_loss


def test_reconstruction_loss_is_the_weighted_sum_of_its_terms() -> None:
    frames, reconstruction = torch.rand(2, 3, 3, 8, 8), torch.rand(2, 3, 3, 8, 8)
    seen = []

    def distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        seen.append(first.shape)
        return (first - second).abs().amax(dim=(1, 2, 3))

    terms = ReconstructionLoss(2.0, 0.5, 3.0)(reconstruction, frames, distance)
    assert seen == [(6, 3, 8, 8)]
    expected = (
        2.0 * (reconstruction - frames).abs().mean()
        + 0.5 * (reconstruction - frames).square().mean()
        + 3.0 * distance(reconstruction.flatten(0, 1), frames.flatten(0, 1)).mean()
    )
    torch.testing.assert_close(terms["total"], expected)


def test_terms_without_weight_are_not_computed() -> None:
    terms = ReconstructionLoss(1.0, 0.0, 0.0)(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
    assert set(terms) == {"l1", "total"}


@pytest.mark.parametrize(
    ("weights", "message"), [((-1, 0, 0), "l1_weight must not be negative"), ((0, 0, 1), "pixel loss")]
)
def test_wrong_weights_are_refused(weights: tuple[float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReconstructionLoss(*weights)


def test_hinge_losses() -> None:
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert discriminator_loss(real, fake) == pytest.approx(0.5 * (0.5 + 1.0))
    assert generator_loss(fake) == pytest.approx(1.0)


def test_adaptive_weight_is_the_ratio_of_gradient_norms_and_is_capped() -> None:
    layer = nn.Linear(4, 4, bias=False)
    x = torch.rand(8, 4)
    y = layer(x)
    weight = adaptive_weight(y.square().mean() * 6, y.square().mean() * 2, [layer.weight])
    assert weight == pytest.approx(3.0, rel=1e-2)
    assert not weight.requires_grad
    assert adaptive_weight(y.sum(), y.sum() * 0.0, [layer.weight]) == 1e4
    y.sum().backward()  # the graph is still there
