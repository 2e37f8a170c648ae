"""Triton kernels for rollouts on a GPU; torch operations take over where Triton or the model does not allow them."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from warnings import warn

import torch

from ivideogpt.models.transformer import Transformer

OLDEST = (8, 0)
"""Compute capability that the kernels need at least (Ampere)."""


@cache
def no_kernels(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on ``device``, None if one was compiled and gave the right result there."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        return "Triton's kernels are for GPUs"
    if torch.cuda.get_device_capability(device) < OLDEST or torch.version.hip is not None:
        return f"they are for NVIDIA GPUs from compute capability {OLDEST[0]}.{OLDEST[1]} on"
    try:
        from ivideogpt.rollout.gpu.norm import agrees

        with torch.cuda.device(device):
            reason = None if agrees(device) else "one of them gave a wrong result"
    except Exception as error:  # no compiler for the launcher, an unknown device, another version of Triton
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        warn(
            f"rollouts on {device} run by torch operations, as Triton's kernels cannot be used: {reason}", stacklevel=2
        )
    return reason


def why_unavailable(transformer: Transformer, precision: str) -> str | None:
    """Why this transformer's rollouts cannot run by the Triton kernels, None if they can."""
    reason = no_kernels(transformer.lm_head.weight.device)
    if reason is not None:
        return reason
    from ivideogpt.rollout.gpu.decoder import unsupported

    return unsupported(transformer.config, precision)
