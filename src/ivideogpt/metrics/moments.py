"""Mean and covariance of vectors in one pass: states that are added to, merged and sent between processes.

The moments of n vectors of D numbers are one float64 tensor (D + 1, D + 1): n in the corner, the mean in the first row
and the sum of outer products of the deviations from the mean in the rest. Deviations, not raw products, so that nothing
cancels where the mean is large against the spread (Chan, Golub and LeVeque, 1979).
"""

from __future__ import annotations

import torch
from torch import Tensor


def empty_moments(size: int) -> Tensor:
    """Moments (size + 1, size + 1) of no vector."""
    return torch.zeros(size + 1, size + 1, dtype=torch.float64)


def moments_of(vectors: Tensor) -> Tensor:
    """Moments of ``vectors`` (n, D)."""
    vectors = vectors.detach().double()
    found = torch.zeros(vectors.shape[1] + 1, vectors.shape[1] + 1, dtype=torch.float64, device=vectors.device)
    if len(vectors):
        mean = vectors.mean(0)
        deviations = vectors - mean
        found[0, 0], found[0, 1:], found[1:, 1:] = len(vectors), mean, deviations.T @ deviations
    return found


def merge_moments(parts: Tensor) -> Tensor:
    """Moments of all vectors together, of the moments of each part: (P, D + 1, D + 1) -> (D + 1, D + 1)."""
    counts = parts[:, 0, 0]
    total = counts.sum()
    merged = torch.zeros_like(parts[0])
    merged[0, 0] = total
    mean = (counts[:, None] * parts[:, 0, 1:]).sum(0) / total.clamp_min(1)
    shifts = parts[:, 0, 1:] - mean
    merged[0, 1:] = mean
    merged[1:, 1:] = parts[:, 1:, 1:].sum(0) + (shifts * counts[:, None]).T @ shifts
    return merged


def count_of(moments: Tensor) -> int:
    """How many vectors the moments are of."""
    return int(moments[0, 0])


def mean_and_covariance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and unbiased covariance (D, D) of two vectors or more."""
    covariance = moments[1:, 1:] / (moments[0, 0] - 1)
    return moments[0, 1:], (covariance + covariance.T) / 2
