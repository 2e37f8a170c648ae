"""What a rollout is fast with on CPUs: C++ kernels that are compiled where they run, and their Python faces."""

from ivideogpt.rollout.cpu.build import load_kernel, why_unavailable
from ivideogpt.rollout.cpu.decoder import KernelDecoder, supported

__all__ = ["KernelDecoder", "load_kernel", "supported", "why_unavailable"]
