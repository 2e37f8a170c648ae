"""Metrics of rollouts as torchmetrics: frames over the horizon, best and mean of n samples, action-following, rewards.

Each takes batches and keeps a few numbers a video, whatever the number of samples: 256 videos of 100 samples are never
in memory at once, samples of a video may come in several updates, and from several processes, which add up what each
has seen. A video that comes twice, as a distributed sampler pads, counts once in all means.

B clips of a batch, S samples a clip, V videos in all, F future frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ivideogpt.metrics.moments import count_of, empty_moments, merge_moments, moments_of
from ivideogpt.metrics.video import HIGHER_IS_BETTER, METRICS, check_range, mse, psnr

Judge = Callable[[Tensor, Tensor], Tensor]
"""Function of (prediction, truth), both (B, F, C, H, W) in [0, 1], that gives (B, F)."""


def _samples(prediction: Tensor, truth: Tensor, videos: Tensor, num_videos: int) -> int:
    """Samples a clip, of a prediction that fits its truth.

    Raises:
        ValueError: naming what does not fit.
    """
    if truth.ndim != 5 or prediction.ndim != 5 or prediction.shape[1:] != truth.shape[1:]:
        raise ValueError(
            "the truth must be (B, F, C, H, W) and the prediction (B*S, F, C, H, W), the samples of a clip side by "
            f"side, got {tuple(truth.shape)} and {tuple(prediction.shape)}"
        )
    if not len(truth) or not len(prediction) or len(prediction) % len(truth):
        raise ValueError(f"{len(prediction)} predictions are no multiple of {len(truth)} clips")
    if videos.shape != (len(truth),):
        raise ValueError(f"videos must number the {len(truth)} clips, got shape {tuple(videos.shape)}")
    if int(videos.min()) < 0 or int(videos.max()) >= num_videos:
        raise ValueError(
            f"videos must be numbered from 0 to {num_videos - 1} (num_videos={num_videos}), got {int(videos.min())} to "
            f"{int(videos.max())}"
        )
    check_range(prediction, "predicted frames", finite=True)
    check_range(truth, "true frames", finite=True)
    return len(prediction) // len(truth)


@torch.no_grad()
def _judged(judge: Judge, prediction: Tensor, truth: Tensor, samples: int) -> Tensor:
    """Values (B, S, F) in float64, one sample of all clips at a time."""
    each = prediction.unflatten(0, (-1, samples))
    return torch.stack([judge(each[:, sample], truth).double() for sample in range(samples)], dim=1)


class FrameMetric(Metric):
    """One metric of predicted frames: its curve over the horizon, and the best and the mean of n samples, in one pass.

    Args:
        judge: ``"psnr"``, ``"ssim"`` or ``"mse"``, or a function of videos such as
            :class:`ivideogpt.metrics.lpips.LPIPS`.
        num_videos: V.
        horizon: F.
        higher_is_better: which sample is the best; must be given for a function, False for LPIPS.
        kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False

    total: Tensor
    count: Tensor
    best: Tensor

    def __init__(
        self,
        judge: str | Judge,
        num_videos: int,
        horizon: int,
        higher_is_better: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(judge, str):
            if judge not in METRICS:
                raise ValueError(f"there is no metric {judge!r}: choose from {', '.join(METRICS)}, or give a function")
            higher_is_better = HIGHER_IS_BETTER[judge]
        if higher_is_better is None:
            raise ValueError("higher_is_better must be given for a function: False for a distance such as LPIPS")
        self.judge: Judge = METRICS[judge] if isinstance(judge, str) else judge
        self.prefers_high, self.num_videos, self.horizon = higher_is_better, num_videos, horizon
        worst = -math.inf if higher_is_better else math.inf
        self.add_state("total", torch.zeros(num_videos, horizon, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(num_videos, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state(
            "best", torch.full((num_videos,), worst, dtype=torch.float64),
            dist_reduce_fx="max" if higher_is_better else "min",
        )  # fmt: skip

    def update(self, prediction: Tensor, truth: Tensor, videos: Tensor) -> None:
        """Adds samples of some videos.

        Args:
            prediction: future frames (B*S, F, C, H, W) in [0, 1], the samples of a clip side by side.
            truth: of each clip, (B, F, C, H, W).
            videos: number (B,) of each clip, from 0 to V - 1.

        Raises:
            ValueError: for shapes that do not fit, values outside of [0, 1], or NaN.
        """
        samples = _samples(prediction, truth, videos, self.num_videos)
        if truth.shape[1] != self.horizon:
            raise ValueError(f"the horizon is {self.horizon} frames, got {truth.shape[1]}")
        values = _judged(self.judge, prediction, truth, samples).to(self.total.device)
        videos = videos.to(self.total.device).long()
        self.total = self.total.index_add(0, videos, values.sum(1))
        self.count = self.count.index_add(0, videos, torch.full_like(videos, samples, dtype=torch.float64))
        which = values.mean(2)  # (B, S)
        nearest = which.amax(1) if self.prefers_high else which.amin(1)
        self.best = self.best.scatter_reduce(0, videos, nearest, "amax" if self.prefers_high else "amin")

    def compute(self) -> dict[str, Tensor]:
        """What was measured.

        Returns:
            ``best``: mean over videos of the best sample's mean over its frames; ``mean``: the same of the samples'
            mean; ``curve`` (F,): mean over videos and samples of each frame; ``best_per_video`` and
            ``mean_per_video`` (V,), NaN for a video that was not seen.

        Raises:
            ValueError: if no video was seen.
        """
        seen = self.count > 0
        if not bool(seen.any()):
            raise ValueError("no video was measured: update() was never called")
        per_frame = self.total / self.count[:, None]  # NaN where not seen
        mean = per_frame.mean(1)
        best = torch.where(seen, self.best, math.nan)
        return {
            "best": best[seen].mean(),
            "mean": mean[seen].mean(),
            "curve": per_frame[seen].mean(0),
            "best_per_video": best,
            "mean_per_video": mean,
        }


class ActionFollowing(Metric):
    """How much worse a prediction gets with another recording's actions: Delta-PSNR, which is 0 if they are ignored.

    Args:
        num_videos: V.
        kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    sums: Tensor

    def __init__(self, num_videos: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_videos = num_videos
        # a video's samples, its PSNR and MSE with its own and with other actions, and how often it stands still
        self.add_state("sums", torch.zeros(num_videos, 6, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, own: Tensor, shuffled: Tensor, truth: Tensor, videos: Tensor) -> None:
        """Adds samples of some videos, each predicted with both actions and the same random numbers.

        Args:
            own: future frames (B*S, F, C, H, W) in [0, 1] predicted with the recording's own actions.
            shuffled: with those of another recording, the same shape.
            truth: of each clip, (B, F, C, H, W).
            videos: number (B,) of each clip, from 0 to V - 1.

        Raises:
            ValueError: for shapes that do not fit, values outside of [0, 1], or NaN.
        """
        if own.shape != shuffled.shape:
            raise ValueError(
                f"both predictions must have the same shape, got {tuple(own.shape)} and {tuple(shuffled.shape)}"
            )
        samples = _samples(own, truth, videos, self.num_videos)
        _samples(shuffled, truth, videos, self.num_videos)
        columns = [torch.full((len(truth),), samples, dtype=torch.float64, device=truth.device)]
        for prediction in (own, shuffled):
            columns += [_judged(judge, prediction, truth, samples).mean(2).sum(1) for judge in (psnr, mse)]
        columns.append((truth == truth[:, :1]).flatten(1).all(1).double() * samples)
        rows = torch.stack(columns, dim=1).to(self.sums.device)
        self.sums = self.sums.index_add(0, videos.to(self.sums.device).long(), rows)

    def compute(self) -> dict[str, Tensor]:
        """What was measured.

        Returns:
            ``delta_psnr``: PSNR with own actions less that with others', in dB, mean over videos; ``psnr_own``,
            ``psnr_shuffled``; ``mse_ratio``: error with others' actions over that with own ones, NaN without error;
            ``still``: videos in which nothing moves, whose actions cannot be followed; ``delta_psnr_per_video`` (V,),
            NaN for a video that was not seen.

        Raises:
            ValueError: if no video was seen.
        """
        seen = self.sums[:, 0] > 0
        if not bool(seen.any()):
            raise ValueError("no video was measured: update() was never called")
        means = self.sums[:, 1:] / self.sums[:, :1]
        own_psnr, own_mse, other_psnr, other_mse, still = means[seen].T
        return {
            "delta_psnr": (own_psnr - other_psnr).mean(),
            "psnr_own": own_psnr.mean(),
            "psnr_shuffled": other_psnr.mean(),
            "mse_ratio": other_mse.mean() / own_mse.mean() if bool(own_mse.any()) else own_mse.new_tensor(math.nan),
            "still": (still > 0).sum(),
            "delta_psnr_per_video": means[:, 0] - means[:, 2],
        }


class RewardAccuracy(Metric):
    """Error of predicted rewards and their correlation with the recorded ones, over all frames.

    Args:
        kwargs: of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    moments: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # of (predicted, recorded, squared error, absolute error)
        self.add_state("moments", empty_moments(4), dist_reduce_fx=merge_moments)

    def update(self, predicted: Tensor, recorded: Tensor) -> None:
        """Adds rewards, both of the same shape, such as (B, F).

        Raises:
            ValueError: for other shapes, or values that are not finite.
        """
        if predicted.shape != recorded.shape:
            raise ValueError(
                "predicted and recorded rewards must have the same shape, got "
                f"{tuple(predicted.shape)} and {tuple(recorded.shape)}"
            )
        rows = torch.stack([value.detach().double().flatten() for value in (predicted, recorded)], dim=1)
        if not bool(torch.isfinite(rows).all()):
            raise ValueError("rewards hold values that are not finite (NaN or infinity)")
        error = (rows[:, :1] - rows[:, 1:]).abs()
        rows = torch.cat([rows, error.square(), error], dim=1).to(self.moments.device)
        self.moments = merge_moments(torch.stack([self.moments, moments_of(rows)]))

    def compute(self) -> dict[str, Tensor]:
        """``mse``, ``mae`` and ``pearson_r``, which is NaN where one of the two does not vary (or is but one).

        Raises:
            ValueError: if there was no reward.
        """
        count = count_of(self.moments)
        if not count:
            raise ValueError("no reward was measured: update() was never called")
        mean, scatter = self.moments[0, 1:], self.moments[1:, 1:]
        scale = (scatter[0, 0] * scatter[1, 1]).sqrt()
        # rounding leaves a constant with a tiny spread, whose direction means nothing
        varies = count > 1 and bool(scale > 1e-12 * count)
        correlation = (scatter[0, 1] / scale).clamp(-1, 1) if varies else mean.new_tensor(math.nan)
        return {"mse": mean[2].clone(), "mae": mean[3].clone(), "pearson_r": correlation}
