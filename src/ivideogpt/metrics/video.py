"""Video metrics: PSNR, SSIM and MSE of predicted frames against the truth, one value per frame.

B clips, S samples a clip, T frames. Videos are (B, T, C, H, W) in [0, 1]; values are (B, T), so that a caller can draw
a curve over time, average over a clip's frames, and take the best of several samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
"""The Gaussian window of the evaluation protocol (Wang et al., 2004)."""

SSIM_PIXELS = 2**18
"""Pixels of frames whose SSIM is computed at once."""

PSNR_FLOOR = 1e-10
"""Smallest mean squared error that PSNR sees: identical frames get 100 dB instead of infinity, which spoils a mean."""


RANGE_TOLERANCE = 1e-3
"""How far a value may lie outside of [0, 1]: rounding of half precision, but no other range."""


def check_range(video: Tensor, what: str, finite: bool = False) -> None:
    """Refuses a video that is not floats in [0, 1].

    Args:
        video: any shape.
        what: it is, for the message.
        finite: whether NaN is refused too; otherwise it passes.

    Raises:
        ValueError: saying which range was found and what to do.
    """
    if not video.is_floating_point():
        raise ValueError(f"{what} must be floats in [0, 1], got {video.dtype}: divide 8-bit frames by 255")
    if video.numel() == 0:
        return
    low, high = (float(value) for value in video.detach().aminmax())
    if finite and not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"{what} hold values that are not finite (NaN or infinity): the model or the recording is broken"
        )
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        cure = "clamp them"
        if low < 0 and low >= -1 - RANGE_TOLERANCE and high <= 1 + RANGE_TOLERANCE:
            cure = "if their range is [-1, 1], add 1 and divide by 2; else clamp them"
        elif low >= 0 and high <= 255:
            cure = "divide 8-bit frames by 255"
        raise ValueError(f"{what} must be in [0, 1], got values from {low:.4g} to {high:.4g}: {cure}")


def _check(prediction: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.ndim != 5 or prediction.shape != truth.shape:
        raise ValueError(
            "prediction and truth must be videos (B, T, C, H, W) of the same shape, "
            f"got {tuple(prediction.shape)} and {tuple(truth.shape)}"
        )
    check_range(prediction, "predicted frames")
    check_range(truth, "true frames")
    return prediction.float(), truth.float()


def mse(prediction: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error (B, T) of each frame of ``prediction`` and ``truth`` (B, T, C, H, W) in [0, 1]."""
    prediction, truth = _check(prediction, truth)
    return (prediction - truth).square().mean(dim=(2, 3, 4))


def psnr(prediction: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B, T) of each frame in dB, at most 100 (see ``PSNR_FLOOR``)."""
    return -10.0 * mse(prediction, truth).clamp_min(PSNR_FLOOR).log10()


def ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity (B, T) of each frame: 11 x 11 Gaussian, sigma 1.5, mean over channels and pixels.

    Only windows that lie inside the frame count, as Wang et al. define it.

    Raises:
        ValueError: if the frames are smaller than the window.
    """
    prediction, truth = _check(prediction, truth)
    if min(prediction.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW} pixels a side, got {tuple(prediction.shape)}")
    return windowed_ssim(prediction, truth, border=SSIM_WINDOW // 2)


def windowed_ssim(
    prediction: Tensor,
    truth: Tensor,
    data_range: float = 1.0,
    border: int = 0,
    gaussian: bool = True,
    window: int = SSIM_WINDOW,
) -> Tensor:
    """SSIM (B, T) of frames of any range, by a window of any kind.

    Args:
        prediction: (B, T, C, H, W).
        truth: of the same shape.
        data_range: between the smallest and the largest value that a pixel can have.
        border: pixels on each side that are left out; without it the frame is continued by reflection.
        gaussian: of sigma 1.5; else a uniform window.
        window: its pixels a side.
    """
    steady = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    size = prediction.shape[-2:]
    # in float64: variances are differences of nearly equal numbers where frames are flat
    rows, columns = (_windows(length, window, border, gaussian).to(prediction.device) for length in size)
    at_once = max(1, SSIM_PIXELS // (size[0] * size[1]))
    parts = [
        _similarity(x.double(), y.double(), rows, columns.T, steady)
        for x, y in zip(prediction.flatten(0, 1).split(at_once), truth.flatten(0, 1).split(at_once), strict=True)
    ]
    return torch.cat(parts).unflatten(0, prediction.shape[:2]).to(prediction.dtype)


def _windows(length: int, window: int, border: int, gaussian: bool) -> Tensor:
    """Each window's weights over a line of pixels (length - 2 border, length), which is continued by reflection."""
    taps = torch.arange(window) - window // 2
    weights = torch.exp(-0.5 * (taps.double() / SSIM_SIGMA) ** 2) if gaussian else torch.ones(window).double()
    places = (torch.arange(border, length - border)[:, None] + taps).abs()
    places = torch.where(places < length, places, 2 * (length - 1) - places)
    found = torch.zeros(len(places), length, dtype=torch.float64)
    return found.scatter_add_(1, places, (weights / weights.sum()).expand_as(places))


def _similarity(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor, steady: tuple[float, float]) -> Tensor:
    """SSIM (N,) of frames (N, C, H, W): windows are sums by rows and columns, so two products with all of them."""
    mean_x, mean_y, square_x, square_y, product = (
        rows @ value @ columns for value in (x, y, x.square(), y.square(), x * y)
    )
    variances = (square_x - mean_x.square()).clamp_min(0) + (square_y - mean_y.square()).clamp_min(0)
    covariance = product - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + steady[0]) / (mean_x.square() + mean_y.square() + steady[0])
    return (luminance * (2 * covariance + steady[1]) / (variances + steady[1])).mean(dim=(1, 2, 3))


def best_of(values: Tensor, num_samples: int, higher_is_better: bool = True) -> Tensor:
    """Best sample (B,) of each clip, by the mean over its frames of ``values`` (B*num_samples, T).

    Samples of a clip stand side by side, as in a rollout's video.
    """
    samples = values.mean(dim=1).unflatten(0, (-1, num_samples))  # (B, S)
    return samples.amax(dim=1) if higher_is_better else samples.amin(dim=1)


METRICS = {"psnr": psnr, "ssim": ssim, "mse": mse}
"""Name -> function of (prediction, truth) that gives (B, T)."""

HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "mse": False}


@torch.no_grad()
def frame_metrics(prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """All metrics of this file, each (B, T), on the CPU in float64.

    Raises:
        ValueError: as they do, and for frames that are not finite.
    """
    check_range(prediction, "predicted frames", finite=True)
    check_range(truth, "true frames", finite=True)
    return {name: metric(prediction, truth).double().cpu() for name, metric in METRICS.items()}
