"""The header of a safetensors file or record, read without trust: a tensor lies inside and is as long as its shape."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

DTYPES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}
MAX_HEADER = 16 * 2**20  # bytes; a larger header is a corrupt length


class Place(NamedTuple):
    """Where a tensor lies: bytes begin .. end - 1 of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def array(self, data: bytes | memoryview) -> np.ndarray:
        """The tensor, of its bytes."""
        return np.frombuffer(data, self.dtype).reshape(self.shape)


def read_header(read: Callable[[int, int], bytes], size: int) -> tuple[dict[str, str], dict[str, Place]]:
    """The metadata and the tensors of a file.

    Args:
        read: `read(offset, size)` gives bytes of the file.
        size: Bytes of the file.

    Raises:
        ValueError: It is no whole safetensors file.
    """
    if size < 8:
        raise ValueError(f"{size} bytes are too few")
    (length,) = struct.unpack("<Q", read(0, 8))
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(f"header of {length} bytes in {size}")
    try:
        entries = json.loads(read(8, length))
        metadata = dict(entries.pop("__metadata__", {}))
        tensors = {}
        for name, entry in entries.items():
            shape = tuple(int(value) for value in entry["shape"])
            begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            dtype = np.dtype(DTYPES[entry["dtype"]])
            fits = 8 + length <= begin <= end <= size and end - begin == math.prod(shape) * dtype.itemsize
            if min((0, *shape)) < 0 or not fits:
                raise ValueError(f"tensor {name!r} of shape {list(shape)} at {begin}..{end} in {size} bytes")
            tensors[name] = Place(dtype, shape, begin, end)
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"unreadable header: {type(error).__name__}: {error}") from error
    return metadata, tensors
