"""What a rollout is fast with on CPUs: C++ kernels that are compiled where they run, and their Python faces."""

from ivideogpt.rollout.cpu.build import load_kernel, why_unavailable
from ivideogpt.rollout.cpu.decoder import KernelDecoder, supported
from ivideogpt.rollout.cpu.prefill import has_bfloat16_products, pixels_dtype

__all__ = ["KernelDecoder", "has_bfloat16_products", "load_kernel", "pixels_dtype", "supported", "why_unavailable"]
