"""What a GPU's data sheet promises, which is what a model's FLOPs utilization (MFU) is a share of."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.throughput import get_available_flops

DENSE = {
    # Lightning does not know these by the names that the driver gives them, or has the figures with sparsity
    "NVIDIA H200": {torch.bfloat16: 989.4e12, torch.float16: 989.4e12, torch.float32: 66.9e12},
    "NVIDIA H200 NVL": {torch.bfloat16: 835.5e12, torch.float16: 835.5e12, torch.float32: 60.0e12},
}
"""Operations a second of matrix products without sparsity, by the driver's name of a GPU."""


def promised_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations a second that matrix products in ``dtype`` reach on ``device`` by its data sheet.

    None on a CPU, and for a GPU that is not known.
    """
    if device.type != "cuda":
        return None
    known = DENSE.get(torch.cuda.get_device_name(device))
    found = get_available_flops(device, dtype) if known is None else known.get(dtype)
    return None if found is None else float(found)
