"""What the kernels' launches need of Triton, where its versions and its interpreter differ."""

from __future__ import annotations

import triton
from triton import knobs

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton, or one without CUDA: kernels then start one after another

    @triton.jit
    def gdc_wait():
        """Never called."""

    @triton.jit
    def gdc_launch_dependents():
        """Never called."""

    OVERLAPPED_LAUNCHES = False
else:
    OVERLAPPED_LAUNCHES = True

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on a CPU (``TRITON_INTERPRET=1``, for tests)."""


def power_of_two(number: int) -> int:
    """The next power of two from ``number`` on."""
    return 1 << max(number - 1, 0).bit_length()


__all__ = ["INTERPRETED", "OVERLAPPED_LAUNCHES", "gdc_launch_dependents", "gdc_wait", "power_of_two"]
