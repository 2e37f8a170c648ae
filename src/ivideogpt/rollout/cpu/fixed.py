"""Products by 16-bit integers (``fixed.cpp``), within some 2e-4 of those of float32.

The error of a product of random numbers is a tenth of what operands of bfloat16 make of it; a number that is small
beside another one in its group of 128 keeps fewer digits.

R rows, I inputs, O outputs, g groups of 128 inputs.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ivideogpt.rollout.cpu.build import load_kernel

GROUP = 128
"""Inputs that share a scale."""

ERROR = 1e-3
"""Relative error of products of random numbers that tells a kernel that is wrong: the one that is right has 2e-4."""


@cache
def has_fixed_products() -> bool:
    """Whether the kernel is there, this processor has instructions for it, and it computes something known."""
    library = load_kernel()
    if library is None or not library.ivideogpt_has_fixed():
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    x, gate = torch.randn(2, 17, 200, generator=generator, **kind)
    weight = torch.randn(70, 200, generator=generator, **kind)
    expected = (F.silu(gate) * x) @ weight.T
    return bool((FixedRows.of(x, gate).linear(weight) - expected).norm() < ERROR * expected.norm())


@dataclass(frozen=True)
class FixedRows:
    """Rows (..., I) as integers (R, g 128) times scales (R, g)."""

    values: Tensor
    scales: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, x: Tensor, gate: Tensor | None = None) -> FixedRows:
        """``x`` (..., I), or ``silu(gate) * x``; float32."""
        shape, inputs = x.shape, x.shape[-1]
        assert gate is None or gate.shape == shape
        x, gate = _flat(x), None if gate is None else _flat(gate)
        groups = -(-inputs // GROUP)
        values = torch.empty(len(x), groups * GROUP, dtype=torch.int16, device="cpu")
        scales = torch.empty(len(x), groups, dtype=torch.float32, device="cpu")
        _library().ivideogpt_fixed_rows(
            *map(_pointer, (x, gate)), *map(c_int64, (len(x), inputs)), *map(_pointer, (values, scales)),
            torch.get_num_threads(),
        )  # fmt: skip
        return cls(values, scales, shape)

    def linear(self, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        """Products (..., O) with ``weight`` (O, I), plus ``bias`` (O,) and ``residual`` (..., O); float32."""
        outputs, inputs = weight.shape
        assert inputs == self.shape[-1], (weight.shape, self.shape)
        y = torch.empty(*self.shape[:-1], outputs, dtype=torch.float32, device="cpu")
        assert residual is None or residual.shape == y.shape
        given = [None if part is None else part.detach().float().contiguous() for part in (weight, bias, residual)]
        _library().ivideogpt_fixed_product(
            *map(_pointer, (self.values, self.scales, *given, y)),
            *map(c_int64, (len(self.values), inputs, outputs)), torch.get_num_threads(),
        )  # fmt: skip
        return y


def _library() -> ctypes.CDLL:
    library = load_kernel()
    assert library is not None and library.ivideogpt_has_fixed()
    return library


def _flat(x: Tensor) -> Tensor:
    assert x.dtype == torch.float32 and x.device.type == "cpu", (x.dtype, x.device)
    return x.reshape(-1, x.shape[-1]).contiguous()


def _pointer(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())
