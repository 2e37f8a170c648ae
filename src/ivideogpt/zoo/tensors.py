"""Safetensors files of a checkpoint: their headers, what is wrong with them, reading and writing.

A header is compared with the model that the configuration describes, built on the meta device, before any memory is
spent on the tensors themselves.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

Shape = tuple[int, ...]
Built = TypeVar("Built")

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
LARGEST_HEADER = 2**24
"""Bytes of a header at most; those of the published files have some 50,000."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LISTED = 5


@dataclass(frozen=True)
class Header:
    """Names, shapes and dtypes of the tensors in the safetensors file ``path``."""

    path: Path
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]


def read_header(path: Path) -> Header:
    """Header of the safetensors file ``path``; no tensor is read.

    Raises:
        ValueError: if there is no such file (with what else lies there), if it is truncated or no safetensors file, or
            if a tensor is not of floating point.
    """
    if not path.is_file():
        raise ValueError(_why_no_weights(path))
    shapes, dtypes = {}, {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                dtypes[name] = part.get_dtype()
    except SafetensorError as error:
        with open(path, "rb") as opened:
            check_no_pickle(opened.read(4), path)
        raise ValueError(
            f"{path} is no intact safetensors file ({error}); it may be truncated: fetch it again"
        ) from error
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise ValueError(f"{path}: tensor {name!r} is of type {dtype}; only {', '.join(_DTYPES)} are read")
    return Header(path, shapes, {name: _DTYPES[dtype] for name, dtype in dtypes.items()})


def header_length(start: bytes, size: int, where: object) -> int:
    """Bytes of the header of a safetensors file, from its first 8 bytes ``start`` and its ``size``.

    Raises:
        ValueError: if they cannot be those of such a file.
    """
    check_no_pickle(start, where)
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if not 2 <= length <= min(size - 8, LARGEST_HEADER):
        raise ValueError(f"{where} is no safetensors file: a header of {length:,} bytes in a file of {size:,}")
    return length


def parse_header(start: bytes, size: int, path: Path) -> Header:
    """Header of a safetensors file that is not here, from its first bytes.

    Args:
        start: the 8 bytes of the length, and the header.
        size: bytes of the file.
        path: what it will be called.

    Raises:
        ValueError: if it is no such header, or says other sizes than the file has.
    """
    length = header_length(start, size, path)
    try:
        rows = json.loads(start[8 : 8 + length])
        rows.pop("__metadata__", None)
        found = {
            str(name): (str(row["dtype"]), tuple(map(int, row["shape"])), tuple(map(int, row["data_offsets"])))
            for name, row in rows.items()
        }
        place = 0
        for name, (dtype, shape, (begin, end)) in sorted(found.items(), key=lambda item: item[1][2]):
            if dtype not in _DTYPES:
                raise ValueError(f"tensor {name!r} is of type {dtype}; only {', '.join(_DTYPES)} are read")
            if min(shape, default=0) < 0 or begin != place or end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
                raise ValueError(f"tensor {name!r} of shape {shape} cannot lie in the bytes {begin:,} to {end:,}")
            place = end
        if place != size - 8 - length:
            raise ValueError(f"it tells of {place:,} bytes of tensors, and the file has {size - 8 - length:,}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the header of {path.name} is not to be believed: {error}") from error
    return Header(
        path,
        {name: shape for name, (_, shape, _) in found.items()},
        {name: _DTYPES[dtype] for name, (dtype, _, _) in found.items()},
    )


def check_no_pickle(start: bytes, where: object) -> None:
    """Refuses a file that begins as pickles do, and as the archives of pickles that ``torch.save`` writes.

    Raises:
        ValueError: saying so.
    """
    if start.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")):
        raise ValueError(
            f"{where} holds a pickle under the name of a safetensors file. Loading a pickle can run any code, so this "
            "package never does"
        )


def check_header(header: Header, expected: Mapping[str, Shape], config_path: Path) -> None:
    """Compares ``header`` with the ``expected`` shapes that the file ``config_path`` describes.

    Raises:
        ValueError: one error that lists the missing, the extra and the misshaped tensors, a few of each.
    """
    shapes = header.shapes
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in shapes]
    extra = [f"{name} {shape}" for name, shape in shapes.items() if name not in expected]
    misshaped = [
        f"{name} is {shapes[name]} and should be {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = [
        f"{len(found)} {what}: {listed(found)}"
        for what, found in (("missing", missing), ("not expected", extra), ("of another shape", misshaped))
        if found
    ]
    if problems:
        raise ValueError(
            f"{header.path} does not hold the tensors that {config_path} describes; " + "; ".join(problems)
        )


class _WithoutInit(TorchFunctionMode):
    """Leaves out every in-place operation: fresh values are of no use here, and on meta they import half of torch."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build_on_meta(build: Callable[[], Built], where: object) -> Built:
    """``build()`` on the meta device, where parameters have shapes and no memory."""
    try:
        with torch.device("meta"), _WithoutInit():
            return build()
    except (RuntimeError, OverflowError, TypeError) as error:  # torch's ways of refusing an absurd size
        raise ValueError(f"{where}: no model of these sizes can be built: {error}") from error


def read_tensors(header: Header, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Tensors of the file of ``header``, on ``device``.

    Args:
        header: as :func:`read_header` gave it.
        device: where they go.
        dtype: what they are converted to; None for float32, or what the file has if that is wider.
    """
    tensors = {}
    with safe_open(header.path, framework="pt") as file:
        for name, stored in header.dtypes.items():
            wanted = dtype or torch.promote_types(stored, torch.float32)
            # a copy: what safetensors returns may be a view of the mapped file, which someone may truncate later
            tensors[name] = file.get_tensor(name).to(device, wanted, copy=True)
    return tensors


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, stored: Mapping[str, torch.dtype], dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Writes ``tensors`` to the safetensors file ``path``.

    Args:
        tensors: by the names that they get in the file.
        path: the file, which must not exist.
        stored: dtypes of the file that they once came from. Narrower ones are used again where every tensor fits
            exactly: bfloat16 weights, which are computed with in float32, are not written twice as large as they were,
            and weights that were trained on are written in full.
        dtype: what they are converted to instead.

    Returns:
        The dtype that each got.

    Raises:
        OSError: if they cannot be written (a full disk).
    """

    def fits(name: str, tensor: Tensor) -> bool:
        if name not in stored or torch.promote_types(stored[name], tensor.dtype) != tensor.dtype:
            return False
        return torch.equal(tensor.to(stored[name]).to(tensor.dtype), tensor)

    as_stored = dtype is None and all(fits(name, tensor) for name, tensor in tensors.items())
    converted = {
        name: tensor.detach().to("cpu", stored[name] if as_stored else (dtype or tensor.dtype)).contiguous()
        for name, tensor in tensors.items()
    }
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(converted, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors lets nobody but the owner read
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    return {name: tensor.dtype for name, tensor in converted.items()}


def _why_no_weights(path: Path) -> str:
    folder = path.parent
    names = sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        return (
            f"no weights at {path}: {folder} holds only {listed(pickles)}, which are pickle files. Loading a pickle "
            "can run any code, so this package never does; convert them to safetensors where you trust them"
        )
    if f"{path.name}.index.json" in names:
        return f"no weights at {path}: they are split over several files; save them again as one file"
    there = f"that folder holds {listed(names)}" if names else "there is nothing there"
    return f"no weights at {path}: {there}"


def listed(items: list[str]) -> str:
    """A few of ``items``, and how many more there are."""
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
