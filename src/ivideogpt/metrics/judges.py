"""What judges a prediction: the frame metrics of a protocol and its feature network, as far as they are at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ivideogpt.metrics import video
from ivideogpt.metrics.lpips import LPIPS
from ivideogpt.metrics.networks import RANDOM, Missing, find_feature_network, find_weights
from ivideogpt.metrics.protocols import EvaluationProtocol

LABELS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "mse": "MSE", "fvd": "FVD"}
HIGHER_IS_BETTER = {**video.HIGHER_IS_BETTER, "lpips": False, "fvd": False}


@dataclass
class Judges:
    """The metrics and networks that are at hand, and what is missing.

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
        fvd_weights: file of the FVD network, or ``random`` for one that serves to try things out; None looks where it
            usually lies.
        device: where networks run.

    Raises:
        ValueError: if a file is not what it should be.
    """
    judges = Judges(dict(video.METRICS))
    if "lpips" in protocol.metrics:
        _add_lpips(judges, protocol.lpips, lpips_weights, device)
    if "fvd" in protocol.metrics and protocol.fvd is not None:
        name = RANDOM if fvd_weights == RANDOM else protocol.fvd
        network = find_feature_network(name, None if fvd_weights == RANDOM else fvd_weights)
        if isinstance(network, Missing):
            judges.missing["fvd"] = network.reason
        else:
            judges.features = network
            judges.hashes["fvd"] = network.sha256
    return judges


def _add_lpips(judges: Judges, network: str, path: str | None, device: Any) -> None:
    found = find_weights(network, path)
    if isinstance(found, Missing):
        judges.missing["lpips"] = found.reason
        return
    judges.frames["lpips"] = LPIPS(network, found).to(device)
    judges.hashes["lpips"] = found.sha256


def other_networks(protocol: EvaluationProtocol, judges: Judges, device: Any = "cpu") -> dict[str, Any]:
    """What an explanation needs beside: LPIPS with the other network, and in words what cannot be had."""
    missing = {}
    if "fvd" in judges.missing:
        missing["FVD network"] = judges.missing["fvd"]
    elif judges.features is not None:
        missing["FVD network"] = (
            "FVD was measured with one network and never with another: there is one published network (I3D), and a "
            "distance by any other is not FVD, though it is often called so"
        )
    beside = Judges({})
    other = "alex" if protocol.lpips == "vgg" else "vgg"
    if "lpips" in judges.frames:
        _add_lpips(beside, other, None, device)
    else:
        beside.missing["lpips"] = judges.missing.get("lpips", "LPIPS is not in this protocol")
    if beside.missing:
        missing["LPIPS network"] = beside.missing["lpips"]
    return {"alternative": beside.frames.get("lpips"), "missing": missing}
