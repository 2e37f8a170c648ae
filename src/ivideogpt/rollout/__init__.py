"""Rollouts of a world model: key/value cache, sampling, the rollout itself, and interactive sessions."""

from ivideogpt.rollout.cache import KVCache
from ivideogpt.rollout.engine import Rollout, rollout
from ivideogpt.rollout.sampling import sample_token
from ivideogpt.rollout.session import Session

__all__ = ["KVCache", "Rollout", "Session", "rollout", "sample_token"]
