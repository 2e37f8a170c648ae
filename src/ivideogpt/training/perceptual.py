"""LPIPS: the learned perceptual distance of frames, over a VGG16 backbone from timm (Zhang et al., 2018)."""

from __future__ import annotations

from importlib import resources
from typing import cast

import torch
from torch import Tensor, nn

TAPS = (3, 8, 15, 22, 29)
"""Layers of VGG16's ``features`` whose outputs are compared: the last activation of each of the five stages."""
BACKBONE = "vgg16.tv_in1k"


class LPIPS(nn.Module):
    """LPIPS distance with learned linear heads; it is a loss and a metric, and never trained here.

    Args:
        backbone: the ``features`` of a VGG16 (timm's and torchvision's layers are the same).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: nn.Sequential) -> None:
        super().__init__()
        self.backbone = backbone
        # ImageNet's mean and standard deviation, for inputs in [-1, 1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        for index, head in enumerate(_linear_heads()):
            self.register_buffer(f"head{index}", head)

    @classmethod
    def pretrained(cls) -> LPIPS:
        """LPIPS over ImageNet's VGG16, fetched from the Hub (or its cache).

        Raises:
            OSError: where the weights cannot be reached, naming the option that does without.
        """
        import timm

        try:
            backbone = cast(nn.Sequential, timm.create_model(BACKBONE, pretrained=True).features)
        except Exception as error:  # the Hub, its cache and the network each fail in ways of their own
            raise OSError(
                f"LPIPS needs the weights of {BACKBONE!r} from the Hugging Face Hub (timm/{BACKBONE}), which cannot be "
                f"reached and are not in the cache ({type(error).__name__}: {error}). Train without the perceptual "
                f"loss: perceptual_weight: 0 (on the command line stages.tokenizer.module.perceptual_weight=0)"
            ) from error
        return cls(backbone)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances (N,) of frames (N, 3, H, W) in [0, 1]."""
        total = first.new_zeros(len(first))
        for index, (a, b) in enumerate(zip(self.features(first), self.features(second), strict=True)):
            difference = (_normalize(a) - _normalize(b)).pow(2)
            total = total + (difference * getattr(self, f"head{index}")).sum(1).mean((1, 2))
        return total

    def features(self, frames: Tensor) -> list[Tensor]:
        """Activations of the five stages for ``frames`` (N, 3, H, W) in [0, 1]."""
        x = (frames * 2.0 - 1.0 - self.shift) / self.scale
        activations = []
        for index, layer in enumerate(self.backbone):
            x = layer(x)
            if index in TAPS:
                activations.append(x)
            if index == TAPS[-1]:
                break
        return activations


def _normalize(x: Tensor) -> Tensor:
    """Unit length over channels; the epsilon under the root keeps the gradient of an all-zero position finite."""
    x = x.float()
    return x / (torch.sqrt(x.pow(2).sum(1, keepdim=True) + 1e-20) + 1e-10)


def _linear_heads() -> list[Tensor]:
    """Weights (1, C, 1, 1) of the five heads, from the file that torchmetrics carries."""
    folder = resources.files("torchmetrics") / "functional" / "image" / "lpips_models"
    with resources.as_file(folder / "vgg.pth") as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"] for index in range(len(TAPS))]
