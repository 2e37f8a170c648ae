"""Triton kernels at both ends of a step: the embedding of a token, and the draw of the next one."""

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


@triton.jit(do_not_specialize=["first_id"], do_not_specialize_on_alignment=["uniforms", "tokens"])
def sample(
    logits, uniforms, tokens, embedding, x, stride, count, first_id, inverse_temperature, uniform_step, token_step,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_X: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token of each row, as ``sample_token`` of ``ivideogpt.rollout.sampling`` draws it; one row a program.

    Logits lie in registers in two parts, BLOCK and REST, so that a vocabulary just above a power of two does not take
    twice the room. The least score of the TOP_K likeliest (0 for all) is found bit by bit: from the highest on, a bit
    is set if at least TOP_K scores reach what is known so far with it, until exactly so many do.

    With WIDTH, the token's embedding becomes the row's residual stream ``x`` (R, WIDTH) of the next step.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    ids = tl.arange(0, BLOCK)
    rest = BLOCK + tl.arange(0, REST)
    there = rest < count
    at = logits + row.to(tl.int64) * stride
    scores = tl.load(at + ids)
    more = tl.load(at + rest, mask=there, other=float("-inf"))
    if GREEDY:
        best = tl.max(scores, axis=0)
        best_more = tl.max(more, axis=0)
        chosen = tl.argmax(scores, axis=0)
        if best_more > best:
            chosen = BLOCK + tl.argmax(more, axis=0)
    else:
        scores = scores * inverse_temperature
        more = more * inverse_temperature
        highest = tl.maximum(tl.max(scores, axis=0), tl.max(more, axis=0))
        if TOP_K > 0:
            order = _in_order(scores)
            order_more = tl.where(there, _in_order(more), 0)
            least = tl.full([], 0, tl.uint32)
            bit = tl.full([], 0x80000000, tl.uint32)
            reached = tl.full([], 0, tl.int32)
            while (bit != 0) & (reached != TOP_K):
                level = least | bit
                reached = tl.sum((order >= level).to(tl.int32), axis=0)
                reached += tl.sum((order_more >= level).to(tl.int32), axis=0)
                least = tl.where(reached >= TOP_K, level, least)
                bit = bit >> 1
            chance = tl.where(order >= least, tl.exp(scores - highest), 0.0)
            chance_more = tl.where(there & (order_more >= least), tl.exp(more - highest), 0.0)
        else:
            chance = tl.exp(scores - highest)
            chance_more = tl.where(there, tl.exp(more - highest), 0.0)
        cumulative = tl.cumsum(chance, axis=0)
        below = tl.max(cumulative, axis=0)
        cumulative_more = below + tl.cumsum(chance_more, axis=0)
        total = tl.max(cumulative_more, axis=0)
        target = tl.load(uniforms + row * uniform_step) * total
        chosen = tl.sum((cumulative <= target).to(tl.int32), axis=0)
        chosen += tl.sum((there & (cumulative_more <= target)).to(tl.int32), axis=0)
        last = tl.sum((cumulative < total).to(tl.int32), axis=0)
        last += tl.sum((there & (cumulative_more < total)).to(tl.int32), axis=0)
        chosen = tl.minimum(tl.minimum(chosen, last), count - 1)
    token = chosen.to(tl.int64) + first_id
    tl.store(tokens + row * token_step, token)
    if WIDTH > 0:
        cols = tl.arange(0, BLOCK_X)
        inside = cols < WIDTH
        values = tl.load(embedding + token * WIDTH + cols, mask=inside, other=0.0)
        tl.store(x + row * WIDTH + cols, values.to(tl.float32), mask=inside)
