"""What else people do to frames before they compare them: lossy storage, resize kernels, windows, value ranges.

Nothing of this is part of a protocol; it serves to say how far each habit alone moves a number. T frames.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ivideogpt.data.transforms import center_crop
from ivideogpt.metrics.video import PSNR_FLOOR, SSIM_WINDOW, mse, windowed_ssim

_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # JFIF, ITU-R BT.601


def jpeg(video: Tensor, quality: int, subsampling: int = 2) -> Tensor:
    """Frames (T, 3, H, W) in [0, 1] as a JPEG file gives them back; ``subsampling`` 2 is 4:2:0, 0 is 4:4:4."""
    frames = []
    for frame in _bytes(video):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, format="JPEG", quality=quality, subsampling=subsampling)
        frames.append(np.asarray(Image.open(buffer).convert("RGB")))
    return _floats(np.stack(frames), video)


def h264(video: Tensor, crf: int = 18) -> Tensor | None:
    """Frames (T, 3, H, W) in [0, 1] as an H.264 file with 4:2:0 colours gives them back; None without PyAV."""
    try:
        import av
    except ImportError:
        return None
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = video.shape[-2], video.shape[-1], "yuv420p"
        stream.options = {"crf": str(crf)}
        for frame in _bytes(video):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return _floats(np.stack(frames), video)


def chroma_420(video: Tensor) -> Tensor:
    """Frames (T, 3, H, W) in [0, 1] whose colours are stored at half the resolution, and nothing else is lost."""
    matrix = video.new_tensor(_TO_YCC)
    luma, *chroma = torch.einsum("ij,tjhw->tihw", matrix, video).split(1, dim=1)
    half = F.avg_pool2d(torch.cat(chroma, dim=1), 2, ceil_mode=True)
    back = F.interpolate(half, video.shape[-2:], mode="bilinear", align_corners=False)
    whole = torch.cat([luma, back], dim=1)
    return torch.einsum("ij,tjhw->tihw", torch.linalg.inv(matrix), whole).clamp(0, 1)


def _bytes(video: Tensor) -> np.ndarray:
    return (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _floats(frames: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(frames.copy()).permute(0, 3, 1, 2).to(like) / 255


KERNELS: dict[str, dict[str, object]] = {
    "nearest pixel": {"mode": "nearest"},
    "bilinear without antialiasing": {"mode": "bilinear", "align_corners": False},
    "bicubic with antialiasing": {"mode": "bicubic", "align_corners": False, "antialias": True},
    "mean over areas": {"mode": "area"},
}
"""Name -> arguments of ``torch.nn.functional.interpolate``."""


def resized(video: Tensor, resolution: int, kernel: str) -> Tensor:
    """Frames (T, 3, H, W) in [0, 1], their largest centred square resized with one of :data:`KERNELS`."""
    options: dict[str, object] = KERNELS[kernel]
    return F.interpolate(center_crop(video), (resolution, resolution), **options).clamp(0, 1)  # type: ignore[arg-type]


def whole_ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    """SSIM (B, T) with the frame's border counted, which is reflected."""
    return windowed_ssim(prediction, truth)


def uniform_ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    """SSIM (B, T) with a uniform 7 x 7 window, scikit-image's default."""
    return windowed_ssim(prediction, truth, border=3, gaussian=False, window=7)


def grey_ssim(prediction: Tensor, truth: Tensor) -> Tensor:
    """SSIM (B, T) of grey frames."""
    weights = prediction.new_tensor(_TO_YCC[0]).view(3, 1, 1)
    grey = [(video * weights).sum(2, keepdim=True) for video in (prediction, truth)]
    return windowed_ssim(grey[0], grey[1], border=SSIM_WINDOW // 2)


def signed_ssim(data_range: float) -> Callable[[Tensor, Tensor], Tensor]:
    """SSIM (B, T) of frames that were scaled to [-1, 1] first, with this data range."""

    def metric(prediction: Tensor, truth: Tensor) -> Tensor:
        return windowed_ssim(2 * prediction - 1, 2 * truth - 1, data_range, SSIM_WINDOW // 2)

    return metric


def signed_psnr(prediction: Tensor, truth: Tensor) -> Tensor:
    """PSNR (B, T) of frames that were scaled to [-1, 1] first, with a data range of 1 that was forgotten there."""
    return -10 * (4 * mse(prediction, truth)).clamp_min(PSNR_FLOOR).log10()


def signed_mse(prediction: Tensor, truth: Tensor) -> Tensor:
    """MSE (B, T) of frames that were scaled to [-1, 1] first."""
    return 4 * mse(prediction, truth)


def clip_psnr(prediction: Tensor, truth: Tensor) -> Tensor:
    """PSNR (B, 1) of the mean squared error of all frames together."""
    return -10 * mse(prediction, truth).mean(1, keepdim=True).clamp_min(PSNR_FLOOR).log10()
