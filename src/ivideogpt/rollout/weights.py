"""Whether a module's weights are still those that something was made from."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn


def weights_key(module: nn.Module) -> tuple[object, ...]:
    """A key that changes when a parameter or buffer of ``module`` is replaced or written to.

    Writes through ``.data`` are not counted by torch: on a CPU the first and the last value of each tensor stand in the
    key too, so that an average of weights that is written that way is noticed; on a GPU, where reading them would wait
    for the device, it is not. Tensors that were made in inference mode keep no count at all; of those, sums over the
    values stand in the key, so they are read each time.
    """
    key: list[object] = []
    waiting: list[tuple[str, nn.Module]] = [("", module)]
    while waiting:  # all parameters and buffers, by the paths of their modules
        path, one = waiting.pop()
        for name, tensor in chain(one._parameters.items(), one._buffers.items()):
            if tensor is not None:
                where = tensor.data_ptr(), tensor.device
                key.append((path, name, where, tensor.dtype, tensor.shape, _version(tensor)))
        waiting += [(f"{path}.{name}", child) for name, child in one._modules.items() if child is not None]
    return tuple(key)


def _version(tensor: Tensor) -> object:
    if not tensor.is_inference():
        return tensor._version, _ends(tensor)
    with torch.inference_mode():
        values = tensor.double()
        return values.sum().item(), values.square().sum().item()


def _ends(tensor: Tensor) -> object:
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    detached = tensor.detach()
    return detached[(0,) * tensor.ndim].item(), detached[(-1,) * tensor.ndim].item()
