"""Rollouts of a world model: decoders, sampling, the rollout itself, and interactive sessions."""

from ivideogpt.rollout.cache import KVCache
from ivideogpt.rollout.engine import Rollout, rollout
from ivideogpt.rollout.sampling import Sampling, sample_token
from ivideogpt.rollout.session import Session
from ivideogpt.rollout.speculation import Speculation

__all__ = ["KVCache", "Rollout", "Sampling", "Session", "Speculation", "rollout", "sample_token"]
