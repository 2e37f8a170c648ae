"""The Frechet distance against scipy's formula, closed forms and Gram matrices; streaming; too few and bad videos."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ivideogpt.metrics.frechet import (
    FrechetDistance,
    VideoFrechetDistance,
    chance_distance,
    frechet_distance,
    minimum_videos,
)
from ivideogpt.metrics.moments import mean_and_covariance, merge_moments, moments_of
from ivideogpt.metrics.networks import random_network


def features(count: int, size: int, seed: int, shift: float = 0.0) -> Tensor:
    """Correlated vectors (count, size), float64, whose standard deviations span four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(99), dtype=torch.float64))[
        0
    ]
    scales = torch.logspace(-3, 1, size, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) * scales @ mixing.T + shift


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.mean(0), rows.T.cov().reshape(rows.shape[1], rows.shape[1])


def with_scipy(first: Tensor, second: Tensor) -> complex:
    """The formula as the field writes it."""
    linalg = pytest.importorskip("scipy.linalg")
    (mean1, covariance1), (mean2, covariance2) = moments(first), moments(second)
    root = linalg.sqrtm(covariance1.numpy() @ covariance2.numpy())
    constant = float((mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace())
    return complex(constant - 2 * np.trace(root))


def with_gram_matrices(first: Tensor, second: Tensor) -> float:
    """Without any covariance: the trace of the root is the sum of the singular values of A B^T / sqrt((n-1)(m-1))."""
    a, b = first - first.mean(0), second - second.mean(0)
    cross = np.linalg.svd((a @ b.T).numpy(), compute_uv=False).sum() / math.sqrt((len(a) - 1) * (len(b) - 1))
    spread = float(a.square().sum()) / (len(a) - 1) + float(b.square().sum()) / (len(b) - 1)
    return float((first.mean(0) - second.mean(0)).square().sum()) + spread - 2 * float(cross)


@pytest.mark.parametrize(("size", "shift"), [(1, 0.5), (8, 0.0), (64, 0.3)])
def test_equals_scipys_formula_where_that_works(size: int, shift: float) -> None:
    first, second = features(400, size, 0), 1.3 * features(300, size, 1, shift)
    expected = with_scipy(first, second)
    assert abs(expected.imag) < 1e-6
    found = frechet_distance(*moments(first), *moments(second))
    assert found == pytest.approx(expected.real, rel=1e-7)
    assert found == pytest.approx(with_gram_matrices(first, second), rel=1e-9)


def test_singular_covariances_where_scipy_fails() -> None:
    first, second = features(20, 64, 0), 1.3 * features(12, 64, 1, 0.3)  # fewer videos than features
    expected = with_gram_matrices(first, second)
    theirs = with_scipy(first, second)
    found = frechet_distance(*moments(first), *moments(second))
    assert found == pytest.approx(expected, rel=1e-9)
    # the reason for our own: complex, not a number, or off by far more than rounding
    assert not math.isfinite(theirs.real) or theirs.imag != 0 or abs(theirs.real - expected) > 1e-9 * expected


def test_closed_forms() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    wide, narrow = torch.diag(torch.tensor([4.0, 9.0, 0.0])), torch.diag(torch.tensor([1.0, 0.0, 0.0]))
    # commuting covariances: the squared distance of the standard deviations
    assert frechet_distance(zero, wide, zero + 2, narrow) == pytest.approx(12 + (2 - 1) ** 2 + 3**2)
    assert frechet_distance(zero, wide, zero, torch.zeros(3, 3)) == pytest.approx(13)
    assert frechet_distance(zero, 0 * wide, zero + 1, 0 * wide) == pytest.approx(3)


@pytest.mark.parametrize("count", [3, 40, 500])
def test_distance_to_itself_is_nothing(count: int) -> None:
    rows = features(count, 40, 0, shift=1000.0)
    mean, covariance = moments(rows)
    assert 0 <= frechet_distance(mean, covariance, mean, covariance) < 1e-9 * float(covariance.trace())


def test_is_symmetric() -> None:
    first, second = moments(features(30, 40, 0)), moments(features(25, 40, 1, 1.0))
    assert frechet_distance(*first, *second) == pytest.approx(frechet_distance(*second, *first), rel=1e-10)


def test_moments_merge_to_those_of_all() -> None:
    rows = features(57, 6, 3, shift=1e4)  # raw second moments in float64 would lose half of the digits
    parts = torch.stack([moments_of(part) for part in (rows[:1], rows[1:20], rows[20:20], rows[20:])])
    mean, covariance = mean_and_covariance(merge_moments(parts))
    torch.testing.assert_close(mean, rows.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(covariance, rows.T.cov(), rtol=1e-9, atol=1e-12)


def test_streamed_in_batches_is_the_same_as_at_once() -> None:
    real, predicted = features(100, 8, 0), features(170, 8, 1, 0.2)
    at_once, streamed = FrechetDistance(8), FrechetDistance(8)
    at_once.update(real, real=True)
    at_once.update(predicted, real=False)
    for part in real.split(7):
        streamed.update(part, real=True)
    for part in predicted.split(13):
        streamed.update(part.float(), real=False)
    assert at_once.counts == streamed.counts == (100, 170)
    assert float(at_once.compute()) == pytest.approx(with_gram_matrices(real, predicted), rel=1e-9)
    assert float(streamed.compute()) == pytest.approx(float(at_once.compute()), rel=1e-5)
    assert at_once.compute().dtype == torch.float64
    assert at_once.notes() == []
    streamed.reset()
    assert streamed.counts == (0, 0)


def test_state_does_not_grow() -> None:
    metric = FrechetDistance(8)
    for seed in range(5):
        metric.update(features(50, 8, seed), real=True)
    assert {name: tuple(value.shape) for name, value in metric.metric_state.items() if isinstance(value, Tensor)} == {
        "real": (9, 9),
        "predicted": (9, 9),
    }


def test_too_few_videos_say_how_many_are_needed_and_what_the_number_means() -> None:
    metric = FrechetDistance(400)
    metric.update(torch.rand(1, 400), real=True)
    metric.update(torch.rand(1, 400), real=False)
    with pytest.raises(ValueError, match=r"at least 2 real and 2 predicted videos, got 1 and 1.*401 of each"):
        metric.compute()
    metric.update(torch.rand(31, 400), real=True)
    metric.update(torch.rand(511, 400), real=False)
    assert float(metric.compute()) > 0
    few, chance = metric.notes()
    assert few.startswith("32 real videos are too few for a covariance of 400 features, which needs 401")
    assert "comes out too large" in few and "same 32 real videos" in few
    assert chance == f"32 and 512 videos of the same distribution would score about {metric.chance():.4g}"


def test_chance_is_what_equal_distributions_score() -> None:
    first, second = features(60, 30, 0), features(4000, 30, 1)  # one distribution
    metric = FrechetDistance(30)
    metric.update(first, real=True)
    metric.update(second, real=False)
    assert metric.chance() == pytest.approx(float(metric.compute()), rel=0.5)
    covariance = second.T.cov()
    assert chance_distance(covariance, 4000, 4000) < 0.1 * chance_distance(covariance, 60, 4000)
    assert minimum_videos(30) == 31


def test_constant_videos() -> None:
    metric = FrechetDistance(4)
    metric.update(torch.full((8, 4), 0.3), real=True)
    metric.update(torch.rand(8, 4), real=False)
    with pytest.raises(ValueError, match="all 8 real videos have the same features: the recordings are constant"):
        metric.compute()
    metric.reset()
    metric.update(torch.rand(8, 4), real=True)
    metric.update(torch.full((8, 4), 0.3), real=False)
    assert float(metric.compute()) > 0  # a model that always predicts the same is bad, and gets its number
    assert "always predicts the same" in metric.notes()[0]


def test_bad_features() -> None:
    metric = FrechetDistance(4)
    with pytest.raises(ValueError, match=r"real features must be \(N, 4\), got \(2, 5\)"):
        metric.update(torch.rand(2, 5), real=True)
    with pytest.raises(ValueError, match="predicted features hold values that are not finite"):
        metric.update(torch.tensor([[1.0, 2.0, 3.0, math.nan]]), real=False)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(torch.zeros(1), torch.tensor([[math.nan]]), torch.zeros(1), torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"covariances \(D, D\)"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(2), torch.eye(3))


def test_videos_of_a_random_network_are_never_called_fvd() -> None:
    metric = VideoFrechetDistance(random_network(6))
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (20, 5, 3, 8, 8), dtype=torch.uint8, generator=generator)
    metric.update(real, real=True)
    metric.update(real.float() / 255, real=False)
    assert float(metric.compute()) == pytest.approx(0, abs=1e-9)
    assert metric.label == "Frechet distance of random features, not FVD"


def test_a_bootstrap_of_videos_has_no_interval_of_the_distance() -> None:
    """Why an evaluation gives none: a third of the videos is never drawn, and fewer videos are further apart."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -1, 40, dtype=torch.float64)
    real, noise = (torch.randn(60, 40, generator=generator, dtype=torch.float64) * scales for _ in range(2))
    predicted = 1.1 * (0.8 * real + 0.6 * noise) + 0.02

    def distance(rows: Tensor) -> float:
        return frechet_distance(*moments(real[rows]), *moments(predicted[rows]))

    drawn = [distance(torch.randint(60, (60,), generator=generator)) for _ in range(40)]
    assert min(drawn) > 1.1 * distance(torch.arange(60))
