"""Tests of the codebook restart."""

from __future__ import annotations

import pytest
import torch
from torch.optim import AdamW

from ivideogpt.models.quantizer import VectorQuantizer
from ivideogpt.training.codebook import CodebookRestart


def test_first_update_initialises_from_data_and_later_ones_wait_for_the_patience() -> None:
    torch.manual_seed(0)
    quantizer, restart = VectorQuantizer(16, 4), CodebookRestart(16, patience=3)
    latents = torch.randn(64, 4) * 5
    indices = quantizer(latents).indices
    used = len(indices.unique())
    assert restart(quantizer, latents, indices) == 16 - used
    rows = quantizer.embedding.weight.detach()
    moved = [index for index in range(16) if index not in indices]
    assert all((latents == rows[index]).all(1).any() for index in moved)
    only = torch.zeros(4, dtype=torch.long)
    assert [restart(quantizer, latents, only) for _ in range(4)] == [0, 0, 15, 0]


def test_moments_of_reseeded_entries_are_cleared() -> None:
    quantizer, restart = VectorQuantizer(8, 4), CodebookRestart(8, patience=1)
    optimizer = AdamW(quantizer.parameters())
    output = quantizer(torch.randn(32, 4))
    output.commitment_loss.backward()
    optimizer.step()
    state = optimizer.state[quantizer.embedding.weight]
    state["exp_avg"].fill_(1.0)
    restart(quantizer, torch.randn(32, 4), torch.tensor([3]), optimizer)
    assert state["exp_avg"][3].eq(1).all()
    assert state["exp_avg"].sum() == 4


def test_more_idle_entries_than_vectors_are_filled_too() -> None:
    quantizer, restart = VectorQuantizer(16, 4), CodebookRestart(16, patience=1)
    assert restart(quantizer, torch.randn(3, 4), torch.tensor([0, 0, 0])) == 15


def test_patience_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1 update, got 0"):
        CodebookRestart(4, 0)
