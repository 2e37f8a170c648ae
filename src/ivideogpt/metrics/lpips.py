"""LPIPS: the learned perceptual distance of frames, over VGG16 or AlexNet (Zhang et al., 2018; version 0.1).

The backbone's weights come from a file with a known SHA-256 (:mod:`ivideogpt.metrics.networks`), the linear heads from
the file that torchmetrics carries, which is the lpips package's.
"""

from __future__ import annotations

import hashlib
import io
import os
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ivideogpt.metrics.networks import Missing, Weights, fetch_weights, find_weights

TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}
"""Layers of each network's ``features`` whose outputs are compared: the last activation of each of the five stages."""

SMALLEST = {"vgg": 16, "alex": 31}
"""Pixels a side without which the last stage has no output."""

HEADS_SHA256 = {
    "vgg": "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    "alex": "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
}

BATCH_SIZE = 64
"""Frames that are compared at once where no gradient is wanted, which bounds the memory."""


class LPIPS(nn.Module):
    """LPIPS distance with learned linear heads; it is a loss and a metric, and never trained here.

    Args:
        network: ``"vgg"`` or ``"alex"``.
        weights: of its backbone: a file, or what :func:`ivideogpt.metrics.networks.find_weights` found; None looks on
            this disk and downloads nothing.
        sha256: that a file must have; None takes those of the published weights.

    Raises:
        ValueError: if there is no such network, or the file is not what it should be.
        OSError: if the weights are not on this disk, saying how to get them.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, network: str = "vgg", weights: str | os.PathLike[str] | Weights | None = None, sha256: str | None = None
    ) -> None:
        super().__init__()
        if network not in TAPS:
            raise ValueError(f"LPIPS has no network {network!r}: choose from {', '.join(TAPS)}")
        found = weights if isinstance(weights, Weights) else find_weights(network, weights, sha256)
        if isinstance(found, Missing):
            raise OSError(found.reason)
        self.network, self.sha256, self.is_reference = network, found.sha256, found.is_reference
        self.backbone = _backbone(network, found)
        # ImageNet's mean and standard deviation, for inputs in [-1, 1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        for index, head in enumerate(_linear_heads(network)):
            self.register_buffer(f"head{index}", head)
        self.eval().requires_grad_(False)

    @classmethod
    def pretrained(cls, network: str = "vgg") -> LPIPS:
        """LPIPS over ImageNet's weights, which are downloaded if they are not on this disk.

        Raises:
            OSError: where the weights cannot be reached, naming the option that does without.
        """
        try:
            return cls(network, fetch_weights(network))
        except OSError as error:
            raise OSError(f"{error}. Train without the perceptual loss: perceptual_weight: 0") from error

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (...) of frames (..., 3, H, W) in [0, 1].

        Raises:
            ValueError: if shapes differ, there are not three channels, or the frames are too small.
        """
        self._check(first, second)
        a, b = first.flatten(0, -4), second.flatten(0, -4)
        if torch.is_grad_enabled() and (first.requires_grad or second.requires_grad):
            distances = self._distances(a, b)
        else:
            parts = zip(a.split(BATCH_SIZE), b.split(BATCH_SIZE), strict=True)
            distances = torch.cat([self._distances(*part) for part in parts])
        return distances.reshape(first.shape[:-3])

    def _check(self, first: Tensor, second: Tensor) -> None:
        if first.ndim < 4 or first.shape != second.shape or first.shape[-3] != 3:
            raise ValueError(
                f"LPIPS compares frames (..., 3, H, W) of the same shape, got {tuple(first.shape)} and "
                f"{tuple(second.shape)}"
            )
        if not (first.is_floating_point() and second.is_floating_point()):
            raise ValueError(
                f"LPIPS needs floats in [0, 1], got {first.dtype} and {second.dtype}: divide 8-bit frames by 255"
            )
        smallest = SMALLEST[self.network]
        if min(first.shape[-2:]) < smallest:
            raise ValueError(
                f"LPIPS ({self.network}) needs frames of at least {smallest} pixels a side, got {tuple(first.shape)}"
            )

    def _distances(self, first: Tensor, second: Tensor) -> Tensor:
        total = first.new_zeros(len(first), dtype=torch.float32)
        for index, (a, b) in enumerate(zip(self.features(first), self.features(second), strict=True)):
            # a backward pass computes the dozen of maps in between again, so that none of them is kept
            total = total + checkpoint(
                _stage_distance, a, b, getattr(self, f"head{index}"), use_reentrant=False, preserve_rng_state=False
            )
        return total

    def features(self, frames: Tensor) -> list[Tensor]:
        """Activations of the five stages for ``frames`` (N, 3, H, W) in [0, 1]."""
        x = (frames * 2.0 - 1.0 - self.shift) / self.scale
        activations = []
        for index, layer in enumerate(self.backbone):
            x = layer(x)
            if index in TAPS[self.network]:
                activations.append(x)
        return activations


def _stage_distance(first: Tensor, second: Tensor, head: Tensor) -> Tensor:
    """Distances (N,) of one stage's activations (N, C, h, w)."""
    return ((_normalize(first) - _normalize(second)).pow(2) * head).sum(1).mean((1, 2))


def _normalize(x: Tensor) -> Tensor:
    """Unit length over channels; the epsilon under the root keeps the gradient of an all-zero position finite."""
    x = x.float()
    return x / (torch.sqrt(x.pow(2).sum(1, keepdim=True) + 1e-20) + 1e-10)


def _backbone(network: str, weights: Weights) -> nn.Sequential:
    """The network's layers up to the last that is compared, with the file's weights."""
    import timm
    import torchvision

    with torch.device("meta"):  # the classifier's weights, nine tenths of all, are never made
        whole: Any = timm.create_model("vgg16") if network == "vgg" else torchvision.models.alexnet(weights=None)
        layers: nn.Sequential = whole.features[: TAPS[network][-1] + 1]
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # activations are kept and compared
    if weights.path.suffix == ".safetensors":
        from safetensors.torch import load

        state = load(weights.content)
    else:
        state = torch.load(io.BytesIO(weights.content), map_location="cpu", weights_only=True)
    named = {name.removeprefix("features."): value for name, value in state.items() if name.startswith("features.")}
    wanted = layers.state_dict()
    if any(name not in named or named[name].shape != value.shape for name, value in wanted.items()):
        raise ValueError(
            f"{weights.path} does not hold the weights of {network!r}: its layers have other names or shapes"
        )
    layers.load_state_dict({name: named[name].float().clone() for name in wanted}, assign=True)
    return layers


def _linear_heads(network: str) -> list[Tensor]:
    """Weights (1, C, 1, 1) of the five heads, from the file that torchmetrics carries.

    Raises:
        ValueError: if a torchmetrics has others.
    """
    file = resources.files("torchmetrics") / "functional" / "image" / "lpips_models" / f"{network}.pth"
    content = file.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != HEADS_SHA256[network]:
        raise ValueError(
            f"the linear heads of LPIPS ({network}) in the installed torchmetrics are not the known ones: SHA-256 "
            f"{found}, expected {HEADS_SHA256[network]}; install another version of torchmetrics"
        )
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"] for index in range(len(TAPS[network]))]
