"""Token perplexity against torchmetrics' and codebook use against direct counts; what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.text import Perplexity

from ivideogpt.metrics.tokens import CodebookUse, TokenPerplexity, codebook_usage
from ivideogpt.models.transformer import next_token_loss


def test_perplexity_is_torchmetrics_and_the_losss() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(5, 12, 30, generator=generator)
    labels = torch.randint(0, 30, (5, 12), generator=generator)
    labels[:, :4] = -100
    ours, theirs = TokenPerplexity(), Perplexity(ignore_index=-100)
    for part in range(0, 5, 2):
        rows = slice(part, part + 2)
        ours.update(logits[rows], labels[rows])
        theirs.update(logits[rows, :-1], labels[rows, 1:])
    found = ours.compute()
    assert float(found["perplexity"]) == pytest.approx(float(theirs.compute()), rel=1e-5)
    assert float(found["loss"]) == pytest.approx(float(next_token_loss(logits, labels)), rel=1e-6)
    assert int(found["tokens"]) == 5 * 8


def test_left_out_ids_do_not_count() -> None:
    logits = torch.zeros(1, 4, 8)
    logits[0, 0, 7] = 50.0  # sure of the slot token, knows nothing of the others
    labels = torch.tensor([[-100, 7, 2, 3]])
    metric = TokenPerplexity(left_out=(7,))
    metric.update(logits, labels)
    found = metric.compute()
    assert float(found["perplexity"]) == pytest.approx(8) and int(found["tokens"]) == 2


def test_bad_tokens() -> None:
    metric = TokenPerplexity()
    with pytest.raises(ValueError, match=r"got \(1, 4, 8\) and \(1, 3\)"):
        metric.update(torch.zeros(1, 4, 8), torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="below the 8 ids of the vocabulary"):
        metric.update(torch.zeros(1, 4, 8), torch.full((1, 4), 8))
    with pytest.raises(ValueError, match="weights are broken"):
        metric.update(torch.full((1, 4, 8), math.nan), torch.zeros(1, 4, dtype=torch.long))
    metric.update(torch.zeros(1, 4, 8), torch.full((1, 4), -100))
    with pytest.raises(ValueError, match="no token was measured"):
        metric.compute()


def test_codebook_use_adds_up() -> None:
    metric = CodebookUse(8)
    metric.update(torch.tensor([[0, 0, 1], [1, 2, 2]]))
    metric.update(torch.tensor([3, 3]))
    found = metric.compute()
    assert float(found["perplexity"]) == pytest.approx(4) and float(found["used"]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="entries of a codebook of 8, got 1 to 8"):
        metric.update(torch.tensor([1, 8]))


def test_usage() -> None:
    assert codebook_usage(torch.tensor([5, 5, 0, 0])) == pytest.approx((2.0, 0.5))
    assert codebook_usage(torch.zeros(4)) == pytest.approx((1.0, 0.0))
