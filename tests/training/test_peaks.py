"""What GPUs promise: figures without sparsity, by the names that drivers give them."""

from __future__ import annotations

import pytest
import torch

from ivideogpt.training.peaks import promised_rate


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.4e12),
        ("NVIDIA H200", torch.float32, 66.9e12),
        ("NVIDIA H200", torch.float64, None),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
    ],
)
def test_dense_products(name: str, dtype: torch.dtype, expected: float | None, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    assert promised_rate(torch.device("cuda"), dtype) == expected


def test_a_cpu_promises_nothing() -> None:
    assert promised_rate(torch.device("cpu"), torch.bfloat16) is None
