"""What models hand to ``torch.compile``: functions that are given the module, so that the module itself stays as it is.

A compiled *method* would be bound to its module, and a copy of the module (averaged weights) would go on computing
with the original's weights; a compiled *module* has other names in its state dict. A function has neither trouble, and
blocks of one structure share one compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


@cache
def compiled(function: F) -> F:
    """``function``, compiled on its first call for each set of shapes."""
    return torch.compile(function, dynamic=False)
