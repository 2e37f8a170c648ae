"""What judges a prediction: the frame metrics of a protocol and its feature network, as far as they are at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ivideogpt.metrics.protocols import EvaluationProtocol
from ivideogpt.metrics.video import mse, psnr, ssim

LABELS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "mse": "MSE", "fvd": "FVD"}
HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "lpips": False, "mse": False, "fvd": False}


@dataclass
class Judges:
    """Attributes: frames, features, missing, hashes.

    Attributes:
        frames: metric -> function of (prediction, truth), both (B, T, C, H, W) in [0, 1], that gives (B, T).
        features: the feature network of the Frechet distance; None if it is missing or not wanted.
        missing: metric -> why it is not measured and how to get what it needs, in words.
        hashes: network -> SHA-256 of its weights.
    """

    frames: dict[str, Callable[[Tensor, Tensor], Tensor]]
    features: Any = None
    missing: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)


def judges_for(
    protocol: EvaluationProtocol, lpips_weights: str | None = None, fvd_weights: str | None = None, device: Any = "cpu"
) -> Judges:
    """What a protocol asks for, as far as the weights can be had; nothing is downloaded.

    PSNR, SSIM and MSE are always measured.

    Args:
        protocol: of the evaluation.
        lpips_weights: file of the LPIPS backbone; None looks where it usually lies.
        fvd_weights: file of the FVD network; None looks where it usually lies.
        device: where networks run.
    """
    return Judges({"psnr": psnr, "ssim": ssim, "mse": mse})


def other_networks(protocol: EvaluationProtocol, judges: Judges, lpips_weights: str | None = None) -> dict[str, Any]:
    """What an explanation needs beside: LPIPS with the other network, and in words what cannot be had."""
    return {"alternative": None, "missing": {}}
