"""Triton kernels at both ends of a step: the embedding of a token, and the draw of the next one.

Tokens are drawn as ``sample_token`` of ``ivideogpt.rollout.sampling`` draws them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ivideogpt.rollout.gpu.launch import gdc_launch_dependents, gdc_wait


@triton.jit
def embed(
    tokens, embedding, actions, action_weight, action_bias, x,
    LENGTH: tl.constexpr, WIDTH: tl.constexpr, ACTION: tl.constexpr, ACTION_AT: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Residual stream x (M, WIDTH) float32 of ``tokens`` (R, LENGTH), M = R LENGTH; one of them a program.

    With ACTION > 0, ``actions`` (R, ACTION) go through their layer and are added to the token at ACTION_AT.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    item = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < WIDTH
    token = tl.load(tokens + item)
    values = tl.load(embedding + token * WIDTH + cols, mask=inside, other=0.0).to(tl.float32)
    if ACTION > 0:
        if item % LENGTH == ACTION_AT:
            values += tl.load(action_bias + cols, mask=inside, other=0.0)
            for index in range(ACTION):
                action = tl.load(actions + item // LENGTH * ACTION + index)
                values += action * tl.load(action_weight + cols * ACTION + index, mask=inside, other=0.0)
    tl.store(x + item * WIDTH + cols, values, mask=inside)


@triton.jit
def _in_order(scores):
    """Unsigned integers in the order of the numbers: those of negative ones are turned around."""
    bits = scores.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _take(tokens, token, row, embedding, x, token_step, WIDTH: tl.constexpr, BLOCK_X: tl.constexpr):
    """Stores a row's token; with WIDTH, its embedding becomes the row's stream ``x`` (R, WIDTH) of the next step."""
    tl.store(tokens + row * token_step, token)
    if WIDTH > 0:
        cols = tl.arange(0, BLOCK_X)
        inside = cols < WIDTH
        values = tl.load(embedding + token * WIDTH + cols, mask=inside, other=0.0)
        tl.store(x + row * WIDTH + cols, values.to(tl.float32), mask=inside)


@triton.jit
def sample_likeliest(
    logits, tokens, embedding, x, stride, count, first_id, token_step,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_X: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The likeliest token of each row, the first of several; one row a program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    best = float("-inf")
    chosen = 0
    for first in range(0, count, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        scores = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < count, other=float("-inf"))
        highest = tl.max(scores, axis=0)
        if highest > best:
            best = highest
            chosen = first + tl.argmax(scores, axis=0)
    _take(tokens, chosen.to(tl.int64) + first_id, row, embedding, x, token_step, WIDTH, BLOCK_X)


@triton.jit
def _drawn(at, count, least, highest, inverse_temperature, uniform, BLOCK: tl.constexpr):
    """Which id a uniform number falls on, among those whose score is at least ``least`` in order; block by block."""
    total = 0.0
    for first in range(0, count, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        scores = tl.load(at + ids, mask=ids < count, other=float("-inf")) * inverse_temperature
        total += tl.sum(tl.where(_in_order(scores) >= least, tl.exp(scores - highest), 0.0), axis=0)
    target = uniform * total
    below = 0.0
    chosen = 0
    last = 0
    for first in range(0, count, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        scores = tl.load(at + ids, mask=ids < count, other=float("-inf")) * inverse_temperature
        chance = tl.where(_in_order(scores) >= least, tl.exp(scores - highest), 0.0)
        cumulative = below + tl.cumsum(chance, axis=0)
        chosen += tl.sum(((ids < count) & (cumulative <= target)).to(tl.int32), axis=0)
        last = tl.maximum(last, tl.max(tl.where(chance > 0.0, ids, 0), axis=0))
        below = tl.max(cumulative, axis=0)
    return tl.minimum(chosen, last)


@triton.jit
def sample_all(
    logits, uniforms, tokens, embedding, x, stride, count, first_id, inverse_temperature, uniform_step, token_step,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_X: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token of each row, drawn among all ids; one row a program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * stride
    highest = float("-inf")
    for first in range(0, count, BLOCK):
        ids = first + tl.arange(0, BLOCK)
        highest = tl.maximum(highest, tl.max(tl.load(at + ids, mask=ids < count, other=float("-inf")), axis=0))
    uniform = tl.load(uniforms + row * uniform_step)
    least = tl.full([], 0, tl.uint32)
    chosen = _drawn(at, count, least, highest * inverse_temperature, inverse_temperature, uniform, BLOCK)
    _take(tokens, chosen.to(tl.int64) + first_id, row, embedding, x, token_step, WIDTH, BLOCK_X)


@triton.jit
def _threshold(order, least, bit, TOP_K: tl.constexpr):
    """The highest level that at least TOP_K of ``order`` reach, of which the bits above ``bit`` are ``least``'s.

    From the highest on, a bit is set if at least TOP_K reach what is known so far with it, until exactly so many do.
    """
    reached = tl.full([], 0, tl.int32)
    while (bit != 0) & (reached != TOP_K):
        level = least | bit
        reached = tl.sum((order >= level).to(tl.int32), axis=0)
        least = tl.where(reached >= TOP_K, level, least)
        bit = bit >> 1
    return least


@triton.jit
def sample_top_k(
    logits, uniforms, tokens, embedding, x, scratch, stride, count, first_id, inverse_temperature, uniform_step,
    token_step,
    TOP_K: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, TILES: tl.constexpr, KEPT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_X: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token of each row, drawn among the TOP_K likeliest ids and ties with the last of them; one row a program.

    Ids are seen in tiles of GROUP: MAIN whole ones, and REST more. The TOP_K-th highest of the tiles' maxima is a bound
    that at least TOP_K ids reach, all of them in the tiles whose maximum reaches it. Those tiles are as few; only they
    are searched for the exact bound, and drawn from. Where ties make them more than KEPT, all ids are gone through.
    ``scratch`` (R, TILES) int32 is written to.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * stride
    of_row = scratch + row * TILES
    inner = tl.arange(0, GROUP)
    main = tl.arange(0, MAIN)
    tiled = tl.load(at + main[:, None] * GROUP + inner[None, :])
    tl.store(of_row + main, _in_order(tl.max(tiled, axis=1) * inverse_temperature).to(tl.int32, bitcast=True))
    rest = MAIN + tl.arange(0, REST)
    ids = rest[:, None] * GROUP + inner[None, :]
    tiled = tl.load(at + ids, mask=ids < count, other=float("-inf"))
    tl.store(of_row + rest, _in_order(tl.max(tiled, axis=1) * inverse_temperature).to(tl.int32, bitcast=True))
    tl.debug_barrier()
    tile = tl.arange(0, TILES)
    there = tile < MAIN + REST
    maxima = tl.load(of_row + tile, mask=there, other=0).to(tl.uint32, bitcast=True)
    bound = _threshold(maxima, tl.full([], 0, tl.uint32), tl.full([], 0x80000000, tl.uint32), TOP_K)
    top = tl.max(maxima.to(tl.int64), axis=0).to(tl.uint32)
    reaching = there & (maxima >= bound)
    found = tl.sum(reaching.to(tl.int32), axis=0)
    uniform = tl.load(uniforms + row * uniform_step)
    bits = (top ^ 0x80000000).to(tl.int32, bitcast=True)  # back to the number
    highest = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    if found <= KEPT:
        place = tl.cumsum(reaching.to(tl.int32), axis=0) - 1
        tl.debug_barrier()
        tl.store(of_row + place, tile, mask=reaching)
        tl.debug_barrier()
        kept = tl.arange(0, KEPT)
        chosen_tiles = tl.load(of_row + kept, mask=kept < found, other=0)
        candidates = tl.reshape(chosen_tiles[:, None] * GROUP + inner[None, :], [KEPT * GROUP])
        seen = tl.reshape((kept < found)[:, None] & (inner >= 0)[None, :], [KEPT * GROUP]) & (candidates < count)
        scores = tl.load(at + candidates, mask=seen, other=float("-inf")) * inverse_temperature
        order = tl.where(seen, _in_order(scores), 0)
        least = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        while (bit != 0) & ((top & bit) == (bound & bit)):  # what the highest and the bound have in common
            least = least | (top & bit)
            bit = bit >> 1
        least = tl.maximum(_threshold(order, least, bit, TOP_K), bound)
        chance = tl.where(seen & (order >= least), tl.exp(scores - highest), 0.0)
        cumulative = tl.cumsum(chance, axis=0)
        total = tl.max(cumulative, axis=0)
        index = tl.sum((cumulative <= uniform * total).to(tl.int32), axis=0)
        last = tl.sum((cumulative < total).to(tl.int32), axis=0)
        index = tl.minimum(index, last)
        position = tl.arange(0, KEPT * GROUP)
        chosen = tl.sum(tl.where(position == index, candidates, 0), axis=0)
    else:
        least = tl.full([], 0, tl.uint32)
        bit = tl.full([], 0x80000000, tl.uint32)
        while bit != 0:
            reached = tl.full([], 0, tl.int32)
            for first in range(0, count, BLOCK):
                ids_here = first + tl.arange(0, BLOCK)
                here = ids_here < count
                values = tl.load(at + ids_here, mask=here, other=float("-inf")) * inverse_temperature
                reached += tl.sum((here & (_in_order(values) >= (least | bit))).to(tl.int32), axis=0)
            least = tl.where(reached >= TOP_K, least | bit, least)
            bit = bit >> 1
        chosen = _drawn(at, count, least, highest, inverse_temperature, uniform, BLOCK)
    _take(tokens, chosen.to(tl.int64) + first_id, row, embedding, x, token_step, WIDTH, BLOCK_X)
