"""The Frechet distance of two sets of features, in one pass over them and without a matrix square root.

``d = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`` for means m and covariances C (Dowson and Landau, 1982). The usual
code takes scipy's square root of the product, which turns complex or NaN where a covariance is singular, that is for
every set of D videos or fewer. Here the covariances are factored, C = F F^T; the trace of the root is then the sum of
the singular values of F1^T F2, which always exist and are never negative.

D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ivideogpt.metrics.moments import count_of, empty_moments, mean_and_covariance, merge_moments, moments_of
from ivideogpt.metrics.networks import FeatureNetwork

MINIMUM = 2
"""Videos without which there is no covariance at all."""


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Frechet distance of two Gaussians, in float64; right for singular covariances too.

    Args:
        mean1: (D,).
        covariance1: (D, D), symmetric.
        mean2: (D,).
        covariance2: (D, D), symmetric.

    Raises:
        ValueError: if shapes do not fit or values are not finite.
    """
    size = mean1.shape[0]
    if mean1.shape != mean2.shape or not covariance1.shape == covariance2.shape == (size, size):
        raise ValueError(
            f"means must be (D,) and covariances (D, D), got {tuple(mean1.shape)}, {tuple(covariance1.shape)}, "
            f"{tuple(mean2.shape)} and {tuple(covariance2.shape)}"
        )
    given = [value.double() for value in (mean1, covariance1, mean2, covariance2)]
    if not all(bool(torch.isfinite(value).all()) for value in given):
        raise ValueError("means and covariances hold values that are not finite (NaN or infinity)")
    m1, c1, m2, c2 = given
    cross = torch.linalg.svdvals(_factor(c1).T @ _factor(c2)).sum()
    distance = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return max(0.0, float(distance))  # rounding may leave the distance of equal sets below zero


def _factor(covariance: Tensor) -> Tensor:
    """F (D, r) with F F^T = C, r the rank of C as far as float64 can tell."""
    values, vectors = torch.linalg.eigh(covariance)
    # below this an eigenvalue is rounding, whose square root would be 1e-8 of the largest and add up over D of them
    resolved = values > len(values) * torch.finfo(values.dtype).eps * values.abs().max()
    return vectors[:, resolved] * values[resolved].sqrt()


def minimum_videos(num_features: int) -> int:
    """Videos that a covariance of D features needs to have full rank."""
    return num_features + 1


def chance_distance(covariance: Tensor, count1: int, count2: int, seed: int = 0) -> float:
    """Distance that two sets drawn from one and the same Gaussian have, because they are finite.

    Args:
        covariance: (D, D) of that Gaussian.
        count1: vectors of the first set.
        count2: vectors of the second set.
        seed: of the drawing.
    """
    factor = _factor(covariance.double().cpu())
    generator = torch.Generator().manual_seed(seed)
    sets = []
    for count in (count1, count2):
        moments = empty_moments(len(covariance))
        for first in range(0, count, 4096):
            drawn = torch.randn(min(4096, count - first), factor.shape[1], generator=generator, dtype=torch.float64)
            moments = merge_moments(torch.stack([moments, moments_of(drawn @ factor.T)]))
        sets.append(mean_and_covariance(moments))
    (mean1, covariance1), (mean2, covariance2) = sets
    return frechet_distance(mean1, covariance1, mean2, covariance2)


class FrechetDistance(Metric):
    """Frechet distance of the features of recorded and of predicted videos; processes add up what each has seen.

    Its state is two tensors (D + 1, D + 1), however many videos there are.

    Args:
        num_features: D, 400 for I3D.
        kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    real: Tensor
    predicted: Tensor

    def __init__(self, num_features: int = 400, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_features = num_features
        for name in ("real", "predicted"):
            self.add_state(name, empty_moments(num_features), dist_reduce_fx=merge_moments)

    def update(self, features: Tensor, real: bool) -> None:
        """Adds features (N, D) of recorded (``real``) or of predicted videos.

        Raises:
            ValueError: for another shape, or values that are not finite.
        """
        whose = "real" if real else "predicted"
        if features.ndim != 2 or features.shape[1] != self.num_features:
            raise ValueError(
                f"{whose} features must be (N, {self.num_features}), got {tuple(features.shape)}; "
                "num_features must be that of the network"
            )
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{whose} features hold values that are not finite (NaN or infinity)")
        state = self.real if real else self.predicted
        merged = merge_moments(torch.stack([state, moments_of(features.to(state.device))]))
        setattr(self, whose, merged)

    def compute(self) -> Tensor:
        """The distance, a float64 scalar; see :meth:`notes` for what it means.

        Raises:
            ValueError: with fewer than two videos on a side, or where all real videos have the same features.
        """
        counts = count_of(self.real), count_of(self.predicted)
        if min(counts) < MINIMUM:
            raise ValueError(
                f"a Frechet distance needs at least {MINIMUM} real and {MINIMUM} predicted videos, got {counts[0]} and "
                f"{counts[1]}; for a covariance of full rank it takes {minimum_videos(self.num_features)} of each"
            )
        mean1, covariance1 = mean_and_covariance(self.real)
        mean2, covariance2 = mean_and_covariance(self.predicted)
        if not _varies(self.real):
            raise ValueError(
                f"all {counts[0]} real videos have the same features: the recordings are constant, or one video was "
                "given again and again"
            )
        distance = frechet_distance(mean1, covariance1, mean2, covariance2)
        return torch.tensor(distance, dtype=torch.float64, device=self.real.device)

    @property
    def counts(self) -> tuple[int, int]:
        """Real and predicted videos that this process has seen."""
        return count_of(self.real), count_of(self.predicted)

    def chance(self, seed: int = 0) -> float:
        """What this many videos of the *same* distribution would score: the part of the distance that is no difference.

        Drawn from a Gaussian with the predicted videos' covariance, or the real ones' if these are more. Samples of one
        video resemble each other, so that many samples of few videos score more than this.
        """
        larger = self.predicted if self.counts[1] >= self.counts[0] else self.real
        return chance_distance(mean_and_covariance(larger)[1], *self.counts, seed=seed)

    def notes(self) -> list[str]:
        """What a reader of the distance must know, in words; empty where there are videos enough."""
        found = []
        needed = minimum_videos(self.num_features)
        for whose, count in zip(("real", "predicted"), self.counts, strict=True):
            if count < needed:
                found.append(
                    f"{count} {whose} videos are too few for a covariance of {self.num_features} features, which needs "
                    f"{needed}: it is singular, the distance comes out too large, and it compares only with distances "
                    f"over the same {count} {whose} videos"
                )
        if min(self.counts) >= MINIMUM:
            if not _varies(self.predicted):
                found.append("all predicted videos have the same features: the model always predicts the same")
            if found:
                found.append(
                    f"{self.counts[0]} and {self.counts[1]} videos of the same distribution would score about "
                    f"{self.chance():.4g}"
                )
        return found


def _varies(moments: Tensor) -> bool:
    """Whether the vectors differ by more than rounding."""
    mean = moments[0, 1:]
    spread = moments[1:, 1:].trace() / moments[0, 0]
    return bool(spread > len(mean) * (torch.finfo(torch.float32).eps * mean.abs().max()) ** 2)


class VideoFrechetDistance(FrechetDistance):
    """Frechet distance of videos: FVD with the published network, and called something else with any other.

    Args:
        network: turns videos into features.
        kwargs: of :class:`torchmetrics.Metric`.
    """

    def __init__(self, network: FeatureNetwork, **kwargs: Any) -> None:
        super().__init__(network.num_features, **kwargs)
        self.network = network

    @property
    def label(self) -> str:
        """What the distance is called."""
        return self.network.label

    def update(self, video: Tensor, real: bool) -> None:
        """Adds recorded (``real``) or predicted videos (N, T, 3, H, W), uint8 or floats in [0, 1].

        Raises:
            ValueError: for what the network refuses.
        """
        super().update(self.network(video), real)
