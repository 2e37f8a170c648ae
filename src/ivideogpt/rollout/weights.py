"""What is made of a module's weights, and whether they are still those that it was made of."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Kept(Generic[T]):
    """What was made of modules' weights, as long as a module lives and its weights stay what they are."""

    def __init__(self) -> None:
        self._made: WeakKeyDictionary[nn.Module, tuple[object, dict[Hashable, T]]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def get(self, module: nn.Module, options: Hashable, make: Callable[[], T], parts: Sequence[nn.Module] = ()) -> T:
        """What ``make`` gives, or gave before of the same weights.

        Args:
            module: that it is kept with.
            options: what else it depends on.
            make: makes one of the weights as they are now; it must not hold ``module``.
            parts: the submodules whose weights it is made of; all if empty.
        """
        key = tuple(weights_key(part) for part in parts or (module,))
        with self._lock:
            weights, made = self._made.get(module, (None, {}))
            if weights != key:
                made = {}
                self._made[module] = (key, made)
            if options not in made:
                made[options] = make()
            return made[options]

    def forget(self, module: nn.Module, wanted: Callable[[Hashable], bool]) -> None:
        """Drops what was made of ``module`` with options that are ``wanted``."""
        with self._lock:
            made = self._made.get(module, (None, {}))[1]
            for options in [options for options in made if wanted(options)]:
                del made[options]


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
    try:
        return tensor._version, _ends(tensor)
    except RuntimeError:  # made in inference mode, even where it no longer says so after a change of its strides
        pass
    with torch.inference_mode():
        values = tensor.double()
        return values.sum().item(), values.square().sum().item()


def _ends(tensor: Tensor) -> object:
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    detached = tensor.detach()
    return detached[(0,) * tensor.ndim].item(), detached[(-1,) * tensor.ndim].item()
