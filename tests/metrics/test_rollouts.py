"""Metrics of rollouts against direct computations, in one pass and in parts; what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ivideogpt.metrics import mse, psnr, ssim
from ivideogpt.metrics.rollouts import ActionFollowing, FrameMetric, RewardAccuracy

JUDGES: dict[str, Any] = {"psnr": psnr, "ssim": ssim, "mse": mse}
V, S, F = 5, 6, 3


@pytest.fixture(scope="module")
def videos() -> tuple[Tensor, Tensor]:
    """Samples (V, S, F, C, H, W) and truth (V, F, C, H, W)."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(V, F, 3, 16, 16, generator=generator)
    noise = torch.randn(V, S, F, 3, 16, 16, generator=generator) * torch.rand(V, S, F, 1, 1, 1, generator=generator)
    return (truth[:, None] + 0.2 * noise).clamp(0, 1), truth


@pytest.mark.parametrize("name", list(JUDGES))
def test_best_mean_and_curve_in_one_pass(name: str, videos: tuple[Tensor, Tensor]) -> None:
    samples, truth = videos
    metric = FrameMetric(name, V, F)
    metric.update(samples.flatten(0, 1), truth, torch.arange(V))
    found = metric.compute()
    values = torch.stack([JUDGES[name](samples[:, sample], truth) for sample in range(S)], dim=1).double()  # (V, S, F)
    clip = values.mean(2)
    best = clip.amin(1) if name == "mse" else clip.amax(1)
    torch.testing.assert_close(found["best_per_video"], best)
    torch.testing.assert_close(found["mean_per_video"], clip.mean(1))
    torch.testing.assert_close(found["best"], best.mean())
    torch.testing.assert_close(found["mean"], clip.mean())
    torch.testing.assert_close(found["curve"], values.mean((0, 1)))


def test_samples_may_come_in_any_parts(videos: tuple[Tensor, Tensor]) -> None:
    samples, truth = videos
    whole, parts = FrameMetric("psnr", V, F), FrameMetric("psnr", V, F)
    whole.update(samples.flatten(0, 1), truth, torch.arange(V))
    for some in ([0], [1, 2, 3], [4, 5]):
        order = torch.randperm(V, generator=torch.Generator().manual_seed(some[0]))
        for rows in order.split(2):
            parts.update(samples[rows][:, some].flatten(0, 1), truth[rows], rows)
    for key, value in whole.compute().items():
        torch.testing.assert_close(parts.compute()[key], value, rtol=1e-6, atol=1e-9)


def test_a_video_twice_in_a_batch_or_in_two_counts_once(videos: tuple[Tensor, Tensor]) -> None:
    samples, truth = videos
    once, twice = FrameMetric("psnr", V, F), FrameMetric("psnr", V, F)
    once.update(samples.flatten(0, 1), truth, torch.arange(V))
    padded = torch.tensor([0, 1, 2, 3, 4, 0])
    twice.update(samples[padded].flatten(0, 1), truth[padded], padded)
    twice.update(samples[:1].flatten(0, 1), truth[:1], padded[:1])
    for key, value in once.compute().items():
        torch.testing.assert_close(twice.compute()[key], value)


def test_videos_that_were_not_seen_are_left_out(videos: tuple[Tensor, Tensor]) -> None:
    samples, truth = videos
    metric = FrameMetric("ssim", V + 3, F)
    metric.update(samples[:2].flatten(0, 1), truth[:2], torch.tensor([6, 1]))
    found = metric.compute()
    assert torch.isnan(found["best_per_video"]).tolist() == [True, False, True, True, True, True, False, True]
    direct = FrameMetric("ssim", 2, F)
    direct.update(samples[:2].flatten(0, 1), truth[:2], torch.arange(2))
    torch.testing.assert_close(found["best"], direct.compute()["best"])


def test_the_state_is_a_few_numbers_a_video(videos: tuple[Tensor, Tensor]) -> None:
    samples, truth = videos
    metric = FrameMetric("psnr", V, F)
    sizes = []
    for _ in range(3):
        metric.update(samples.flatten(0, 1), truth, torch.arange(V))
        sizes.append(sum(value.numel() for value in metric.metric_state.values() if isinstance(value, Tensor)))
    assert sizes == [V * (F + 2)] * 3


def test_forward_gives_the_batch_and_adds_it(videos: tuple[Tensor, Tensor]) -> None:
    samples, truth = videos
    metric = FrameMetric("mse", V, F)
    first = metric(samples[:2].flatten(0, 1), truth[:2], torch.tensor([0, 1]))
    metric(samples[2:].flatten(0, 1), truth[2:], torch.tensor([2, 3, 4]))
    whole = FrameMetric("mse", V, F)
    whole.update(samples.flatten(0, 1), truth, torch.arange(V))
    torch.testing.assert_close(metric.compute(), whole.compute())
    torch.testing.assert_close(first["best_per_video"][:2], whole.compute()["best_per_video"][:2])


def test_a_function_is_judged_by_its_own_direction(videos: tuple[Tensor, Tensor]) -> None:
    samples, truth = videos
    given = FrameMetric(mse, V, F, higher_is_better=False)
    named = FrameMetric("mse", V, F)
    for metric in (given, named):
        metric.update(samples.flatten(0, 1), truth, torch.arange(V))
    torch.testing.assert_close(given.compute(), named.compute())
    with pytest.raises(ValueError, match="higher_is_better must be given"):
        FrameMetric(mse, V, F)
    with pytest.raises(ValueError, match="no metric 'fid': choose from psnr, ssim, mse"):
        FrameMetric("fid", V, F)


def test_bad_frames(videos: tuple[Tensor, Tensor]) -> None:
    samples, truth = videos[0].flatten(0, 1), videos[1]
    metric, numbers = FrameMetric("psnr", V, F), torch.arange(V)
    broken = samples.clone()
    broken[3, 1, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"predicted frames hold values that are not finite \(NaN or infinity\)"):
        metric.update(broken, truth, numbers)
    with pytest.raises(
        ValueError, match=r"true frames must be in \[0, 1\], got values from -1 to .*add 1 and divide by 2"
    ):
        metric.update(samples, (truth * 2 - 1).clamp(-1, 1).round(), numbers)
    with pytest.raises(ValueError, match=r"predicted frames must be floats in \[0, 1\], got torch\.uint8"):
        metric.update((samples * 255).byte(), truth, numbers)
    with pytest.raises(ValueError, match=r"got \(5, 3, 3, 16, 16\) and \(30, 2, 3, 16, 16\)"):
        metric.update(samples[:, :2], truth, numbers)
    with pytest.raises(ValueError, match="29 predictions are no multiple of 5 clips"):
        metric.update(samples[:29], truth, numbers)
    with pytest.raises(ValueError, match="the horizon is 3 frames, got 2"):
        metric.update(samples[:, :2], truth[:, :2], numbers)
    with pytest.raises(ValueError, match="must number the 5 clips"):
        metric.update(samples, truth, numbers[:3])
    with pytest.raises(ValueError, match=r"numbered from 0 to 4 .*got 1 to 5"):
        metric.update(samples, truth, numbers + 1)
    with pytest.raises(ValueError, match="no video was measured"):
        metric.compute()


def test_delta_psnr(videos: tuple[Tensor, Tensor]) -> None:
    samples, truth = videos
    generator = torch.Generator().manual_seed(5)
    other = (samples + 0.3 * torch.rand(samples.shape, generator=generator)).clamp(0, 1)
    metric = ActionFollowing(V)
    for rows in torch.arange(V).split(2):
        metric.update(samples[rows].flatten(0, 1), other[rows].flatten(0, 1), truth[rows], rows)
    found = metric.compute()
    own = torch.stack([psnr(samples[:, sample], truth) for sample in range(S)]).double().mean((0, 2))
    shuffled = torch.stack([psnr(other[:, sample], truth) for sample in range(S)]).double().mean((0, 2))
    torch.testing.assert_close(found["delta_psnr"], (own - shuffled).mean())
    torch.testing.assert_close(found["delta_psnr_per_video"], own - shuffled)
    torch.testing.assert_close(found["psnr_own"], own.mean())
    assert float(found["mse_ratio"]) > 1 and int(found["still"]) == 0


def test_a_model_that_ignores_actions_has_no_delta_and_still_videos_are_counted(videos: tuple[Tensor, Tensor]) -> None:
    samples, truth = videos[0][:, 0], videos[1].clone()
    truth[2] = truth[2, :1]
    metric = ActionFollowing(V)
    metric.update(samples, samples, truth, torch.arange(V))
    found = metric.compute()
    assert float(found["delta_psnr"]) == 0 and float(found["mse_ratio"]) == 1 and int(found["still"]) == 1
    with pytest.raises(ValueError, match="both predictions must have the same shape"):
        metric.update(samples, samples[:4], truth, torch.arange(V))
    with pytest.raises(ValueError, match="not finite"):
        metric.update(samples, samples * math.nan, truth, torch.arange(V))


def test_a_perfect_prediction_has_no_ratio(videos: tuple[Tensor, Tensor]) -> None:
    truth = videos[1]
    metric = ActionFollowing(V)
    metric.update(truth, truth.flip(0), truth, torch.arange(V))
    assert math.isnan(float(metric.compute()["mse_ratio"]))
    assert float(metric.compute()["psnr_own"]) == 100


def test_rewards_are_correlated_and_their_error_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.rand(8, 5, generator=generator) * 10 + 1000  # an offset that raw sums of squares would drown in
    predicted = true + torch.rand(8, 5, generator=generator)
    metric = RewardAccuracy()
    for part in range(0, 8, 3):
        metric.update(predicted[part : part + 3], true[part : part + 3])
    found = metric.compute()
    expected = torch.corrcoef(torch.stack([predicted.flatten(), true.flatten()]).double())[0, 1]
    assert float(found["pearson_r"]) == pytest.approx(float(expected), rel=1e-9)
    assert float(found["mse"]) == pytest.approx(float((predicted - true).double().square().mean()), rel=1e-9)
    assert float(found["mae"]) == pytest.approx(float((predicted - true).double().abs().mean()), rel=1e-9)


def test_constant_rewards_have_no_correlation_and_bad_ones_are_refused() -> None:
    metric = RewardAccuracy()
    metric.update(torch.full((2, 3), 0.1), torch.rand(2, 3))
    found = metric.compute()
    assert math.isnan(float(found["pearson_r"])) and float(found["mse"]) > 0
    with pytest.raises(ValueError, match=r"same shape, got \(2, 3\) and \(2, 2\)"):
        metric.update(torch.rand(2, 3), torch.rand(2, 2))
    with pytest.raises(ValueError, match="not finite"):
        metric.update(torch.tensor([math.nan]), torch.tensor([1.0]))
