"""Vector quantizer: nearest codebook entry with a straight-through gradient (van den Oord et al., 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class QuantizerOutput:
    """Attributes: quantized (..., D), indices (...), commitment_loss scalar."""

    quantized: Tensor
    indices: Tensor
    commitment_loss: Tensor


class VectorQuantizer(nn.Module):
    """Codebook of ``codebook_size`` entries of width ``codebook_dim``.

    The commitment loss is ||z - sg(e)||^2 + ||sg(z) - e||^2 (mean over elements): beta is 1 in the published models.
    """

    def __init__(self, codebook_size: int, codebook_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    def nearest(self, z: Tensor) -> Tensor:
        """Indices (...) of the entries nearest to ``z`` (..., D), distances computed in float32 at least."""
        codebook = self.embedding.weight
        dtype = torch.promote_types(z.dtype, torch.float32)
        with torch.autocast(z.device.type, enabled=False), torch.no_grad():
            return torch.cdist(z.reshape(-1, z.shape[-1]).to(dtype), codebook.to(dtype)).argmin(1).view(z.shape[:-1])

    def forward(self, z: Tensor) -> QuantizerOutput:
        indices = self.nearest(z)
        entries = self.embedding(indices)
        loss = F.mse_loss(z.float(), entries.detach().float()) + F.mse_loss(entries.float(), z.detach().float())
        return QuantizerOutput(z + (entries - z).detach(), indices, loss)
