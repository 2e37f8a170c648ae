"""Rollouts of a world model: decoders, sampling, the rollout itself, and interactive sessions."""

from ivideogpt.rollout.engine import Rollout, rollout
from ivideogpt.rollout.precision import PrecisionReport, compare_precisions
from ivideogpt.rollout.sampling import Sampling, sample_token
from ivideogpt.rollout.session import Session
from ivideogpt.rollout.speculation import Speculation

__all__ = [
    "PrecisionReport", "Rollout", "Sampling", "Session", "Speculation", "compare_precisions", "rollout", "sample_token"
]  # fmt: skip
