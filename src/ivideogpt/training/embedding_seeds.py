"""Fresh token embeddings that know the codebooks: ids whose entries look alike start with embeddings that are alike."""

from __future__ import annotations

import torch

from ivideogpt.models.tokenizer import CompressiveTokenizer
from ivideogpt.models.transformer import Transformer

NOISE = 0.1
"""Share of independent noise, so that two ids with one entry can part."""


@torch.no_grad()
def seed_embeddings(transformer: Transformer, tokenizer: CompressiveTokenizer) -> None:
    """Sets a fresh transformer's token embeddings and output rows to random projections of the codebook entries.

    Their scale is that of the usual initialisation. In a short training most ids are seen too rarely for embeddings
    from scratch; so seeded, what is learnt of one id holds for its neighbours in the codebook. The slots' embeddings
    stay as they are.

    Args:
        transformer: over the ids of ``tokenizer``; its ``embed_tokens`` and ``lm_head`` are overwritten.
        tokenizer: trained.
    """
    std, start = transformer.config.initializer_range, 0
    for quantizer in (tokenizer.quantize, tokenizer.dynamics_quantize):
        entries = quantizer.embedding.weight.float()  # (K, D)
        entries = entries - entries.mean(dim=0)
        entries = entries / entries.square().sum(dim=1).mean().sqrt().clamp_min(1e-12)  # mean squared length 1
        end = start + len(entries)
        for weight in (transformer.embed_tokens.weight, transformer.lm_head.weight):
            projection = torch.randn(entries.shape[1], weight.shape[1], device=entries.device)
            rows = entries @ projection
            weight[start:end] = std * (rows + NOISE * torch.randn_like(rows))
        start = end
