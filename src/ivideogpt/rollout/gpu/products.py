"""Triton kernels of the products with weights: each layer is norm, product and what follows it in one kernel.

``*_rows`` serve a few rows: a program holds its weights in registers, which it loads before it waits for the kernel in
front (programmatic dependent launch), so that the memory hardly pauses between kernels. With more rows a library's
products are faster, and the other kernels do what stands between them.

M rows of LENGTH tokens each, K inputs and N outputs of a product. x is the float32 residual stream (M, D).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ivideogpt.rollout.gpu.launch import gdc_launch_dependents, gdc_wait


@triton.jit
def _normed(x, scale, eps, cols, inside, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """RMS norm of one row, rounded to the weights' type as a module in that type does, then float32 again."""
    values = tl.load(x + cols, mask=inside, other=0.0)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    return (values * inverse * scale).to(dtype).to(tl.float32)


@triton.jit
def _store_qkv(
    low, high, rows, there, head, within, first, prefix_length, cosines, sines, query, keys, values, capacity,
    LENGTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Turns the halves ``low`` and ``high`` of a head by their positions, and puts them where they belong.

    Queries go to ``query`` (M, H, d); keys and values into the rows' own positions (M / LENGTH, KV_HEADS, capacity, d).
    """
    own = first + rows % LENGTH
    turned_low = low
    turned_high = high
    if head < HEADS + KV_HEADS:
        at = (prefix_length + own)[:, None] * DIM + within[None, :]
        cosine = tl.load(cosines + at, mask=there[:, None], other=0.0)
        sine = tl.load(sines + at, mask=there[:, None], other=0.0)
        turned_low = low * cosine - high * sine
        turned_high = high * cosine + low * sine
    target = query
    place = (rows * HEADS + head).to(tl.int64)
    if head >= HEADS:
        kv_head = head - HEADS
        target = keys
        if head >= HEADS + KV_HEADS:
            kv_head = head - HEADS - KV_HEADS
            target = values
        place = ((rows // LENGTH).to(tl.int64) * KV_HEADS + kv_head) * capacity + own
    at = place[:, None] * DIM + within[None, :]
    dtype = query.dtype.element_ty
    tl.store(target + at, turned_low.to(dtype), mask=there[:, None])
    tl.store(target + at + DIM // 2, turned_high.to(dtype), mask=there[:, None])


@triton.jit(do_not_specialize=["offset"])
def qkv_rows(
    x, norm, weight, cosines, sines, start, query, keys, values, capacity, prefix_length, offset, eps,
    ROWS: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values of a few rows; a program makes 2 HALF outputs of one head."""
    if PDL == 1:
        gdc_launch_dependents()
    cols = tl.arange(0, BLOCK_K)
    inside = cols < WIDTH
    pair = tl.program_id(0) * HALF
    head = pair // (DIM // 2)
    within = pair % (DIM // 2) + tl.arange(0, HALF)
    at = weight + (head * DIM + within)[:, None] * WIDTH + cols[None, :]
    weight_low = tl.load(at, mask=inside[None, :], other=0.0)
    weight_high = tl.load(at + DIM // 2 * WIDTH, mask=inside[None, :], other=0.0)
    scale = tl.load(norm + cols, mask=inside, other=0.0)
    first = tl.load(start).to(tl.int32) + offset
    if PDL:
        gdc_wait()
    if PDL == 2:
        gdc_launch_dependents()
    for row in tl.static_range(ROWS):
        h = _normed(x + row * WIDTH, scale, eps, cols, inside, WIDTH, weight.dtype.element_ty)
        low = tl.sum(weight_low.to(tl.float32) * h[None, :], axis=1)
        high = tl.sum(weight_high.to(tl.float32) * h[None, :], axis=1)
        rows = row + tl.arange(0, 1)
        _store_qkv(
            low[None, :], high[None, :], rows, rows < ROWS, head, within, first, prefix_length, cosines, sines,
            query, keys, values, capacity, LENGTH, HEADS, KV_HEADS, DIM,
        )  # fmt: skip


@triton.jit(do_not_specialize=["offset"])
def qkv_scatter(
    qkv, cosines, sines, start, query, keys, values, capacity, prefix_length, offset, row_count,
    LENGTH: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """What follows the product of a library: turns a head of ``qkv`` (M, N) and puts it where it belongs."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    within = tl.arange(0, DIM // 2)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < row_count
    first = tl.load(start).to(tl.int32) + offset
    at = qkv + rows[:, None] * ((HEADS + 2 * KV_HEADS) * DIM) + (head * DIM + within)[None, :]
    low = tl.load(at, mask=there[:, None], other=0.0).to(tl.float32)
    high = tl.load(at + DIM // 2, mask=there[:, None], other=0.0).to(tl.float32)
    _store_qkv(
        low, high, rows, there, head, within, first, prefix_length, cosines, sines, query, keys, values, capacity,
        LENGTH, HEADS, KV_HEADS, DIM,
    )  # fmt: skip


@triton.jit
def gate_up_rows(
    x, norm, weight, out, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, OUTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of a few rows, (M, OUTS); the weights are gate's rows above up's."""
    if PDL == 1:
        gdc_launch_dependents()
    cols = tl.arange(0, BLOCK_K)
    inside = cols < WIDTH
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = outs < OUTS
    wanted = kept[:, None] & inside[None, :]
    at = weight + outs[:, None] * WIDTH + cols[None, :]
    weight_gate = tl.load(at, mask=wanted, other=0.0)
    weight_up = tl.load(at + OUTS * WIDTH, mask=wanted, other=0.0)
    scale = tl.load(norm + cols, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    if PDL == 2:
        gdc_launch_dependents()
    for row in tl.static_range(ROWS):
        h = _normed(x + row * WIDTH, scale, eps, cols, inside, WIDTH, weight.dtype.element_ty)
        gate = tl.sum(weight_gate.to(tl.float32) * h[None, :], axis=1)
        up = tl.sum(weight_up.to(tl.float32) * h[None, :], axis=1)
        tl.store(out + row * OUTS + outs, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=kept)


@triton.jit
def gated(gate_up, out, count, OUTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """What follows the product of a library: silu of the first half of a row of ``gate_up`` times the second."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = item < count
    at = gate_up + item // OUTS * (2 * OUTS) + item % OUTS
    gate = tl.load(at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(at + OUTS, mask=there, other=0.0).to(tl.float32)
    tl.store(out + item, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=there)


@triton.jit
def _joined(outputs, lse, row, SPLITS: tl.constexpr, HEADS: tl.constexpr, BLOCK_H: tl.constexpr, DIM: tl.constexpr):
    """Attention (BLOCK_H DIM) of one row, joined from the parts that its positions were split into."""
    heads = tl.arange(0, BLOCK_H)
    dims = tl.arange(0, DIM)
    inside = heads < HEADS
    peak = tl.full([BLOCK_H], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        peak = tl.maximum(peak, tl.load(lse + (row * SPLITS + split) * HEADS + heads, mask=inside, other=0.0))
    values = tl.zeros([BLOCK_H, DIM], tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    for split in tl.static_range(SPLITS):
        part = (row * SPLITS + split) * HEADS + heads
        factor = tl.exp(tl.load(lse + part, mask=inside, other=0.0) - peak)
        at = outputs + part[:, None] * DIM + dims[None, :]
        values += factor[:, None] * tl.load(at, mask=inside[:, None], other=0.0)
        total += factor
    return tl.reshape(values / total[:, None], [BLOCK_H * DIM])


@triton.jit
def residual_rows(
    x, inputs, lse, weight,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, OUTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Adds a product to a few rows of x; with SPLITS, its inputs are the parts of an attention, to be joined first."""
    if PDL == 1:
        gdc_launch_dependents()
    cols = tl.arange(0, BLOCK_K)
    inside = cols < WIDTH
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = outs < OUTS
    at = weight + outs[:, None] * WIDTH + cols[None, :]
    part = tl.load(at, mask=kept[:, None] & inside[None, :], other=0.0)
    dtype = weight.dtype.element_ty
    if PDL:
        gdc_wait()
    if PDL == 2:
        gdc_launch_dependents()
    for row in tl.static_range(ROWS):
        before = tl.load(x + row * OUTS + outs, mask=kept, other=0.0)
        if SPLITS > 0:
            h = _joined(inputs, lse, row, SPLITS, HEADS, BLOCK_K // DIM, DIM).to(dtype).to(tl.float32)
        else:
            h = tl.load(inputs + row * WIDTH + cols, mask=inside, other=0.0).to(tl.float32)
        added = tl.sum(part.to(tl.float32) * h[None, :], axis=1)
        tl.store(x + row * OUTS + outs, before + added, mask=kept)


@triton.jit
def join(
    outputs, lse, out,
    SPLITS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention (M, H d) of all rows, joined from its parts; one row a program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < HEADS * DIM
    values = _joined(outputs, lse, row, SPLITS, HEADS, BLOCK // DIM, DIM)
    tl.store(out + row * (HEADS * DIM) + cols, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_norm(
    x, added, norm, out, eps, row_first, row_step,
    WIDTH: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Adds ``added`` (M, WIDTH) to x if ADD, and writes the norm of the rows row_first + i row_step of x to ``out``."""
    if PDL == 1:
        gdc_launch_dependents()
    item = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    scale = tl.load(norm + cols, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    if PDL == 2:
        gdc_launch_dependents()
    at = x + (row_first + item * row_step) * WIDTH + cols
    values = tl.load(at, mask=inside, other=0.0)
    if ADD:
        values += tl.load(added + item * WIDTH + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, values, mask=inside)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / WIDTH + eps)
    tl.store(out + item * WIDTH + cols, (values * inverse * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def head_rows(
    x, norm, weight, out, eps, row_first, row_step, outs_count, out_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits (ROWS, outs_count), rows out_stride apart, of the rows row_first + i row_step of x; float32."""
    if PDL == 1:
        gdc_launch_dependents()
    cols = tl.arange(0, BLOCK_K)
    inside = cols < WIDTH
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = outs < outs_count
    at = weight + outs[:, None] * WIDTH + cols[None, :]
    part = tl.load(at, mask=kept[:, None] & inside[None, :], other=0.0)
    scale = tl.load(norm + cols, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    if PDL == 2:
        gdc_launch_dependents()
    for item in tl.static_range(ROWS):
        row = x + (row_first + item * row_step) * WIDTH
        h = _normed(row, scale, eps, cols, inside, WIDTH, weight.dtype.element_ty)
        tl.store(out + item * out_stride + outs, tl.sum(part.to(tl.float32) * h[None, :], axis=1), mask=kept)
