"""Fixtures of the rollout's tests: frequencies against probabilities, and transformers of chosen logits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ivideogpt.config import TransformerConfig
from ivideogpt.models.transformer import Transformer


@pytest.fixture(scope="session")
def assert_frequencies() -> Callable[[Tensor, Tensor], None]:
    """``assert_frequencies(tokens, probabilities)``: chi-square test at 0.1 %; a fixed seed always passes or fails."""

    def check(tokens: Tensor, probabilities: Tensor) -> None:
        found = torch.bincount(tokens.flatten(), minlength=len(probabilities))
        possible = probabilities > 0
        assert found[~possible].sum() == 0
        expected = probabilities[possible].double()
        expected *= tokens.numel() / expected.sum()
        statistic = ((found[possible] - expected).square() / expected).sum()
        freedom = torch.tensor(len(expected) - 1.0, dtype=torch.float64)
        assert torch.special.gammaincc(freedom / 2, statistic / 2) > 1e-3  # the probability of at least this statistic

    return check


@pytest.fixture(scope="session")
def chosen_logits() -> Callable[[Tensor], Transformer]:
    """``chosen_logits(logits)`` is a real transformer whose every position has these logits, whatever it is fed."""

    def build(logits: Tensor) -> Transformer:
        model = Transformer(TransformerConfig(len(logits), 1, 1, embed_dim=16, mlp_dim=16, max_positions=256))
        with torch.no_grad():
            model.embed_tokens.weight.fill_(1.0)
            for name, weight in model.layers.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.zero_()  # the blocks add nothing, and the norm of ones is ones
            model.lm_head.weight.copy_(logits.clamp(min=-1e4)[:, None].expand(-1, 16) / 16)
        return model.eval()

    return build
