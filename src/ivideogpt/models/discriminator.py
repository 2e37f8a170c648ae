"""PatchDiscriminator: the convolutional critic of the adversarial tokenizer loss (PatchGAN, Isola et al., 2017)."""

from __future__ import annotations

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Frames (B, C, H, W) to one logit for each patch, (B, 1, h, w): high for real, low for reconstructed.

    Args:
        in_channels: colour channels.
        base_channels: channels after the first layer, doubled at each further one up to eight times.
        num_layers: layers of stride 2.
        norm_num_groups: groups of the group norms. Batch statistics would couple the processes of a distributed run.
    """

    def __init__(
        self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3, norm_num_groups: int = 8
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, base_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = base_channels
        for depth in range(1, num_layers + 1):
            previous, width = width, base_channels * min(2**depth, 8)
            layers += [
                nn.Conv2d(previous, width, 4, stride=2 if depth < num_layers else 1, padding=1, bias=False),
                nn.GroupNorm(norm_num_groups, width),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, frames: Tensor) -> Tensor:
        return self.layers(frames)
