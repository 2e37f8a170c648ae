"""RewardHead: a linear layer that reads the reward of a frame from the hidden state of its last dynamics token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ivideogpt.config import RewardHeadConfig


def symlog(x: Tensor) -> Tensor:
    """sign(x) log(1 + |x|), which tames rewards of different scales (Hafner et al., arXiv 2301.04104)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Inverse of :func:`symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


class RewardHead(nn.Module):
    """Linear reward head; it is trained, with a mean squared error, on transformed rewards."""

    def __init__(self, config: RewardHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config.embed_dim, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """Transformed reward (B, F) from the hidden states (B, F, D) at the layout's reward positions."""
        return self.linear(hidden).squeeze(-1)

    def transform(self, rewards: Tensor) -> Tensor:
        """What the head is trained to predict, for the simulator's ``rewards``."""
        return symlog(rewards) if self.config.transform == "symlog" else rewards

    def predict(self, hidden: Tensor) -> Tensor:
        """Reward (B, F) in the simulator's units, float32."""
        raw = self.forward(hidden.to(self.linear.weight.dtype)).float()
        return symexp(raw) if self.config.transform == "symlog" else raw
