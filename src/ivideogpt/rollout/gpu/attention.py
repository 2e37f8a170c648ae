"""Triton kernels of attention over a shared prefix and a row's own positions.

The positions are split into parts, each with an output and the logarithm of its sum of exponentials, by which they
are joined afterwards (see ``_joined`` in ``products.py``); it is -inf in a part that has no position.

M = R LENGTH rows of queries, R = B SAMPLES rows of the cache, d head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ivideogpt.rollout.gpu.launch import gdc_launch_dependents, gdc_wait


@triton.jit
def _store_part(outputs, lse, part, output, peak, total, dims, DIM: tl.constexpr):
    """Output and log-sum-exp of one part; nothing (0 and -inf) if it has no position."""
    total = tl.maximum(total, 1e-37)
    tl.store(outputs + part * DIM + dims, output / total)
    tl.store(lse + part, peak + tl.log(total))


@triton.jit(do_not_specialize=["offset"])
def attend_rows(
    query, prefix_keys, prefix_values, keys, values, start, outputs, lse,
    prefix_length, capacity, offset, scale, prefix_chunk, own_chunk,
    LENGTH: tl.constexpr, SAMPLES: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, ONCE: tl.constexpr, PREFIX_SPLITS: tl.constexpr, SPLITS: tl.constexpr,
    FIRST_SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part of the positions for one row and one key/value head a program.

    Parts from 0 to PREFIX_SPLITS - 1 are of the prefix, ``prefix_chunk`` positions each, the others of the own
    positions, ``own_chunk`` each. The token at ``offset`` behind ``start`` sees itself and what is in front of it. With
    ONCE a part is one block, and what was there in front of ``start``, that is before this graph, is loaded before the
    kernel in front has ended. Later positions may still be on their way: kernels start ahead of each other, as many as
    the device has room for, and those of a small model reach back to the token before.
    """
    if PDL == 1:
        gdc_launch_dependents()
    row = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1) + FIRST_SPLIT
    cache_row = row // LENGTH
    dims = tl.arange(0, DIM)
    source_keys = prefix_keys
    source_values = prefix_values
    base = ((cache_row // SAMPLES).to(tl.int64) * KV_HEADS + kv_head) * prefix_length * DIM
    begin = split * prefix_chunk
    end = tl.minimum(begin + prefix_chunk, prefix_length)
    fresh = end
    if split >= PREFIX_SPLITS:
        fresh = tl.load(start).to(tl.int32)
        source_keys = keys
        source_values = values
        base = (cache_row.to(tl.int64) * KV_HEADS + kv_head) * capacity * DIM
        begin = (split - PREFIX_SPLITS) * own_chunk
        end = tl.minimum(begin + own_chunk, fresh + offset + row % LENGTH + 1)
    part = (row * SPLITS + split) * HEADS
    if ONCE:
        positions = begin + tl.arange(0, BLOCK)
        at = base + positions[:, None] * DIM + dims[None, :]
        seen = positions < end
        old = (seen & (positions < fresh))[:, None]
        key = tl.load(source_keys + at, mask=old, other=0.0)
        value = tl.load(source_values + at, mask=old, other=0.0)
        if PDL:
            gdc_wait()
        if PDL == 2:
            gdc_launch_dependents()
        new = (seen & (positions >= fresh))[:, None]
        key += tl.load(source_keys + at, mask=new, other=0.0)
        value += tl.load(source_values + at, mask=new, other=0.0)
        for group in tl.static_range(HEADS // KV_HEADS):
            head = kv_head * (HEADS // KV_HEADS) + group
            q = tl.load(query + (row * HEADS + head) * DIM + dims).to(tl.float32) * scale
            scores = tl.where(seen, tl.sum(key.to(tl.float32) * q[None, :], axis=1), float("-inf"))
            peak = tl.max(scores, axis=0)
            weights = tl.where(seen, tl.exp(scores - peak), 0.0)
            output = tl.sum(weights[:, None] * value.to(tl.float32), axis=0)
            _store_part(outputs, lse, part + head, output, peak, tl.sum(weights, axis=0), dims, DIM)
    else:
        if PDL:
            gdc_wait()
        if PDL == 2:
            gdc_launch_dependents()
        for group in tl.static_range(HEADS // KV_HEADS):
            head = kv_head * (HEADS // KV_HEADS) + group
            q = tl.load(query + (row * HEADS + head) * DIM + dims).to(tl.float32) * scale
            peak = float("-inf")
            total = 0.0
            output = tl.zeros([DIM], tl.float32)
            for first in range(begin, end, BLOCK):
                positions = first + tl.arange(0, BLOCK)
                seen = positions < end
                at = base + positions[:, None] * DIM + dims[None, :]
                key = tl.load(source_keys + at, mask=seen[:, None], other=0.0).to(tl.float32)
                value = tl.load(source_values + at, mask=seen[:, None], other=0.0).to(tl.float32)
                scores = tl.where(seen, tl.sum(key * q[None, :], axis=1), float("-inf"))
                highest = tl.maximum(peak, tl.max(scores, axis=0))
                weights = tl.exp(scores - highest)
                factor = tl.exp(peak - highest)
                total = total * factor + tl.sum(weights, axis=0)
                output = output * factor + tl.sum(weights[:, None] * value, axis=0)
                peak = highest
            _store_part(outputs, lse, part + head, output, peak, total, dims, DIM)


@triton.jit
def attend_prefix(
    query, prefix_keys, prefix_values, outputs, lse, prefix_length, scale, chunk, tiles, clip_queries,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part of the prefix for BLOCK_M queries of one clip and one key/value head a program, by the matrix units.

    A clip has ``clip_queries`` queries a key/value head, in ``tiles`` tiles: SAMPLES LENGTH rows, of each of which all
    heads of the group look at the same keys.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    GROUPS: tl.constexpr = HEADS // KV_HEADS
    clip = tl.program_id(0) // tiles
    item = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    there = item < clip_queries
    row = clip * (clip_queries // GROUPS) + item // GROUPS
    head = kv_head * GROUPS + item % GROUPS
    dims = tl.arange(0, DIM)
    q = tl.load(query + (row * HEADS + head)[:, None] * DIM + dims[None, :], mask=there[:, None], other=0.0)
    base = (clip.to(tl.int64) * KV_HEADS + kv_head) * prefix_length * DIM
    begin = split * chunk
    end = tl.minimum(begin + chunk, prefix_length)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    output = tl.zeros([BLOCK_M, DIM], tl.float32)
    for first in range(begin, end, BLOCK):
        positions = first + tl.arange(0, BLOCK)
        seen = positions < end
        at = base + positions[:, None] * DIM + dims[None, :]
        key = tl.load(prefix_keys + at, mask=seen[:, None], other=0.0)
        value = tl.load(prefix_values + at, mask=seen[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        highest = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp(scores - highest[:, None])
        factor = tl.exp(peak - highest)
        total = total * factor + tl.sum(weights, axis=1)
        output = tl.dot(weights.to(value.dtype), value, output * factor[:, None], input_precision="ieee")
        peak = highest
    part = (row * SPLITS + split) * HEADS + head
    tl.store(outputs + part[:, None] * DIM + dims[None, :], output / total[:, None], mask=there[:, None])
    tl.store(lse + part, peak + tl.log(total), mask=there)
