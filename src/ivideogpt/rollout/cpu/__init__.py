"""What a rollout is fast with on CPUs: C++ kernels that are compiled where they run, and their Python faces."""

from ivideogpt.rollout.cpu.build import load_kernel, why_unavailable
from ivideogpt.rollout.cpu.decoder import KernelDecoder, supported
from ivideogpt.rollout.cpu.winograd import pixels_dtype

__all__ = ["KernelDecoder", "load_kernel", "pixels_dtype", "supported", "why_unavailable"]
