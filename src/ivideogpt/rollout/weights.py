"""Whether a module's weights are still those that something was made from."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn


def weights_key(module: nn.Module) -> tuple[object, ...]:
    """A key that changes when a parameter or buffer of ``module`` is replaced or written to, and reads no weights.

    Tensors that were made in inference mode keep no count of what was written to them; of those, sums over the values
    stand in the key, so they are read each time.
    """
    return tuple(
        (name, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.device, _version(tensor))
        for name, tensor in chain(module.named_parameters(), module.named_buffers())
    )


def _version(tensor: Tensor) -> object:
    if not tensor.is_inference():
        return tensor._version
    with torch.inference_mode():
        values = tensor.double()
        return values.sum().item(), values.square().sum().item()
