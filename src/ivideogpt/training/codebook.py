"""Codebook help: re-seeds entries that no vector chose for a while."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ivideogpt.models.quantizer import VectorQuantizer


class CodebookRestart(nn.Module):
    """Re-seeds codebook entries that were not chosen in ``patience`` updates from current encoder outputs.

    A fresh codebook lies in a tiny ball that most of its entries never leave; a short training then ends with a few
    used ones. At the first update every entry that is not chosen counts as idle long enough, which makes the first
    re-seeding an initialisation from data. Random choices come from torch's generator.

    Args:
        codebook_size: entries.
        patience: updates without a choice after which an entry is re-seeded.
    """

    idle: Tensor

    def __init__(self, codebook_size: int, patience: int) -> None:
        super().__init__()
        if patience < 1:
            raise ValueError(f"the patience of a codebook restart must be at least 1 update, got {patience!r}")
        self.patience = patience
        self.register_buffer("idle", torch.full((codebook_size,), patience - 1))  # updates since the last choice

    @torch.no_grad()
    def forward(
        self, quantizer: VectorQuantizer, latents: Tensor, indices: Tensor, optimizer: Optimizer | None = None
    ) -> int:
        """Counts one update and re-seeds; returns the number of re-seeded entries.

        Args:
            quantizer: whose codebook it is.
            latents: (..., D), the vectors of this update before quantization.
            indices: (...), the entries they chose.
            optimizer: whose moments of the re-seeded entries are cleared.
        """
        codebook = quantizer.embedding.weight
        used = torch.bincount(indices.flatten(), minlength=codebook.shape[0])
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed:
            torch.distributed.all_reduce(used)
        self.idle += 1
        self.idle[used > 0] = 0
        dead = (self.idle >= self.patience).nonzero().flatten()
        if len(dead) == 0:
            return 0
        pool = latents.reshape(-1, latents.shape[-1]).to(codebook.dtype)
        picks = torch.randperm(len(pool), device=pool.device)
        fresh = pool[picks.repeat(-(-len(dead) // len(picks)))[: len(dead)]]
        if distributed:
            torch.distributed.broadcast(fresh, src=0)
        codebook.data[dead] = fresh
        self.idle[dead] = 0
        if optimizer is not None:
            for value in optimizer.state.get(codebook, {}).values():
                if isinstance(value, Tensor) and value.shape == codebook.shape:
                    value[dead] = 0
        return len(dead)
