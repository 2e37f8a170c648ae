"""Metrics of predicted video, and the evaluation of a world model's rollouts."""

from ivideogpt.metrics.video import best_of, mse, psnr, ssim

__all__ = ["best_of", "mse", "psnr", "ssim"]
