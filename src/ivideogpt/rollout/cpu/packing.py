"""Weights, keys and values in the order in which the kernel reads them, and the structs that it is handed.

A matrix (outputs, inputs) is cut into blocks of 32 outputs; inside a block the inputs follow one another, each with its
32 weights side by side (``gemm.h``). The last block is filled up with zeros.

N outputs, I inputs, P positions, d head_dim.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
"""Outputs of a block of weights."""

KEYS = 16
"""Positions of a block of keys."""

GROUP = 128
"""Inputs that share the 32 scales of a block of int8 weights."""

TYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}
"""Precision of the weights to the number that the kernel knows it by."""

_LARGE_PAGE = 2**21


class Matrix(ctypes.Structure):
    """A packed matrix, as ``gemm.h`` declares it."""

    _fields_ = (
        ("data", c_void_p), ("bias", c_void_p), ("inputs", c_int64), ("outputs", c_int64), ("block_bytes", c_int64),
        ("type", c_int32), ("group", c_int32),
    )  # fmt: skip


class Layer(ctypes.Structure):
    """A transformer's layer, as ``kernel.cpp`` declares it."""

    _fields_ = (
        ("attention_norm", c_void_p), ("mlp_norm", c_void_p),
        ("qkv", Matrix), ("out", Matrix), ("gate_up", Matrix), ("down", Matrix),
    )  # fmt: skip


class Model(ctypes.Structure):
    """A transformer, as ``kernel.cpp`` declares it."""

    _fields_ = (
        ("embedding", c_void_p), ("norm", c_void_p), ("layers", ctypes.POINTER(Layer)), ("head", Matrix),
        ("num_layers", c_int64), ("dim", c_int64), ("heads", c_int64), ("kv_heads", c_int64), ("head_dim", c_int64),
        ("mlp_dim", c_int64), ("vocab", c_int64), ("eps", c_float), ("kv_type", c_int32),
    )  # fmt: skip


class Positions(ctypes.Structure):
    """A prefix and the rows' own positions, ``Branch`` in ``kernel.cpp``."""

    _fields_ = (
        ("prefix_keys", c_void_p), ("prefix_values", c_void_p), ("keys", c_void_p), ("values", c_void_p),
        ("cos", c_void_p), ("sin", c_void_p),
        ("rows", c_int64), ("samples", c_int64), ("prefix_length", c_int64), ("capacity", c_int64),
        ("length", c_int64),
    )  # fmt: skip


class Draws(ctypes.Structure):
    """How tokens are drawn, as ``kernel.cpp`` declares it."""

    _fields_ = (
        ("uniforms", c_void_p), ("tokens", c_void_p), ("count", c_int64), ("first_id", c_int64), ("last_id", c_int64),
        ("top_k", c_int64), ("temperature", c_float), ("greedy", c_int32),
    )  # fmt: skip


def whole(number: int, of: int) -> int:
    """``number`` rounded up to a multiple of ``of``."""
    return -(-number // of) * of


def block_bytes(inputs: int, precision: str) -> int:
    """Bytes of a block of 32 outputs by ``inputs``."""
    if precision == "int8":
        return BLOCK * inputs + 4 * BLOCK * -(-inputs // GROUP)
    return BLOCK * inputs * (4 if precision == "float32" else 2)


def packed_bytes(outputs: int, inputs: int, precision: str) -> int:
    """Bytes of a packed matrix."""
    return -(-outputs // BLOCK) * block_bytes(inputs, precision)


def pack(library: ctypes.CDLL, weight: Tensor, precision: str, out: Tensor, bias: int | None = None) -> Matrix:
    """Packs ``weight`` (N, I) into the bytes ``out`` (packed_bytes(N, I, precision),).

    Args:
        library: the kernel.
        weight: any float dtype.
        precision: a key of ``TYPES``.
        out: must outlive the result, which points to it.
        bias: address of the packed bias.
    """
    outputs, inputs = weight.shape
    assert out.numel() == packed_bytes(outputs, inputs, precision) and out.is_contiguous()
    matrix = Matrix(
        out.data_ptr(), bias, inputs, outputs, block_bytes(inputs, precision), TYPES[precision], GROUP
    )  # fmt: skip
    weight = weight.detach().float().contiguous()
    library.ivideogpt_pack(ctypes.byref(matrix), weight.data_ptr(), torch.get_num_threads())
    return matrix


def pack_bias(bias: Tensor) -> Tensor:
    """``bias`` (N,) as float32, filled up to whole blocks with zeros."""
    return F.pad(bias.float(), (0, -len(bias) % BLOCK)).contiguous()


def interleave(first: Tensor, second: Tensor) -> Tensor:
    """Rows of two matrices or vectors (N, ...), filled up to whole blocks: 32 of the one, then 32 of the other."""
    fill = [0, 0] * (first.dim() - 1) + [0, -len(first) % BLOCK]
    blocks = [F.pad(part, fill).unflatten(0, (-1, BLOCK)) for part in (first, second)]
    return torch.stack(blocks, dim=1).flatten(0, 2)


def pack_keys(keys: Tensor, out: Tensor) -> None:
    """Packs ``keys`` (..., P, d) into ``out`` (..., P rounded up, d), as (..., blocks, d, 16); behind P it is zero."""
    filled = F.pad(keys, (0, 0, 0, -keys.shape[-2] % KEYS))
    out.view(*out.shape[:-2], -1, out.shape[-1], KEYS).copy_(filled.unflatten(-2, (-1, KEYS)).transpose(-1, -2))


def pack_values(values: Tensor, out: Tensor) -> None:
    """Packs ``values`` (..., P, d) into ``out`` (..., P rounded up, d), as (..., d / chunk, P rounded up, chunk)."""
    room, dim = out.shape[-2:]
    chunks = out.view(*out.shape[:-2], -1, room, value_chunk(dim))
    positions = values.shape[-2]
    chunks[..., :positions, :].copy_(values.unflatten(-1, (-1, value_chunk(dim))).transpose(-2, -3))


def value_chunk(head_dim: int) -> int:
    """Features of a chunk of values."""
    return 16 if head_dim % 32 else 32


def empty_bytes(count: int, library: ctypes.CDLL) -> Tensor:
    """``count`` bytes that are not written yet, in large pages where there are enough of them."""
    if count < 4 * _LARGE_PAGE:
        return torch.empty(count + 64, dtype=torch.uint8, device="cpu").narrow(0, 0, count)
    memory = torch.empty(whole(count, _LARGE_PAGE) + _LARGE_PAGE, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % _LARGE_PAGE
    library.ivideogpt_large_pages(c_void_p(memory.data_ptr() + start), c_int64(whole(count, _LARGE_PAGE)))
    return memory.narrow(0, start, count)
