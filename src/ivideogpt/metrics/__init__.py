"""Metrics of predicted video, and the evaluation of a world model's rollouts."""

from ivideogpt.metrics.frechet import FrechetDistance, VideoFrechetDistance
from ivideogpt.metrics.lpips import LPIPS
from ivideogpt.metrics.networks import FeatureNetwork, Missing, find_feature_network
from ivideogpt.metrics.rollouts import ActionFollowing, FrameMetric, RewardAccuracy
from ivideogpt.metrics.tokens import CodebookUse, TokenPerplexity
from ivideogpt.metrics.video import best_of, mse, psnr, ssim

__all__ = [
    "LPIPS",
    "ActionFollowing",
    "CodebookUse",
    "FeatureNetwork",
    "FrameMetric",
    "FrechetDistance",
    "Missing",
    "RewardAccuracy",
    "TokenPerplexity",
    "VideoFrechetDistance",
    "best_of",
    "find_feature_network",
    "mse",
    "psnr",
    "ssim",
]
