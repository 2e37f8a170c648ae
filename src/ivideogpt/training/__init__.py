"""Training tasks: Lightning modules that are given built models, with their losses, optimizer, logs and callbacks."""

from __future__ import annotations

from ivideogpt.training.evaluation_module import EvaluationModule
from ivideogpt.training.grpo_module import GRPOModule
from ivideogpt.training.reward_module import RewardModule
from ivideogpt.training.tokenizer_module import TokenizerModule
from ivideogpt.training.transformer_module import TransformerModule

__all__ = ["EvaluationModule", "GRPOModule", "RewardModule", "TokenizerModule", "TransformerModule"]
