"""Kernels that decide who computes what: experts of each token, then tokens of each expert.

Nothing is asked of the device: `group_kernel` sorts the pairs of token and expert by expert, and a
product's program finds its expert by itself from how many pairs each has. Its grid is sized for the
worst case, in which every expert wastes most of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def route_kernel(
    logits: tl.tensor,
    experts: tl.tensor,
    shares: tl.tensor,
    stride: tl.tensor,
    COUNT: tl.constexpr,
    CHOSEN: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHOSEN_BLOCK: tl.constexpr,
) -> None:
    """One token: softmax over all experts, then the largest one after another; grid (T,)."""
    token = tl.program_id(0).to(tl.int64)
    number, place = tl.arange(0, BLOCK), tl.arange(0, CHOSEN_BLOCK)
    row = tl.load(logits + token * stride + number, mask=number < COUNT, other=-float("inf"))
    row = row.to(tl.float32)
    odds = tl.exp(row - tl.max(row, axis=0))
    whole = tl.sum(odds, axis=0)
    odds = tl.where(number < COUNT, odds / whole, -1.0)
    picked = tl.zeros([CHOSEN_BLOCK], tl.int32)
    parts = tl.zeros([CHOSEN_BLOCK], tl.float32)
    for turn in tl.static_range(CHOSEN):
        # Of equal ones the first.
        best = tl.max(odds, axis=0)
        which = tl.min(tl.where(odds == best, number, BLOCK), axis=0)
        # Where nothing is a number, one past the last would win, which has no weights to read.
        which = tl.minimum(which, COUNT - 1)
        picked = tl.where(place == turn, which, picked)
        parts = tl.where(place == turn, best, parts)
        odds = tl.where(number == which, -1.0, odds)
    if NORMALISED:
        parts = parts / tl.sum(parts, axis=0)
    parts = tl.where(whole == whole, parts, float("nan"))
    tl.store(experts + token * CHOSEN + place, picked, mask=place < CHOSEN)
    tl.store(shares + token * CHOSEN + place, parts, mask=place < CHOSEN)


@triton.jit(do_not_specialize=["pairs"])
def group_kernel(
    experts: tl.tensor,
    order: tl.tensor,
    counts: tl.tensor,
    pairs: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The pairs of one expert in their order, behind those of lower experts; grid (E,).

    `order` int32 [pairs] gets the pairs' numbers and `counts` int32 [E] how many each expert has.
    """
    expert = tl.program_id(0)
    within = tl.arange(0, BLOCK)
    before = 0
    for start in range(0, pairs, BLOCK):
        chosen = tl.load(experts + start + within, mask=start + within < pairs, other=2**30)
        before += tl.sum((chosen < expert).to(tl.int32), axis=0)
    count = 0
    for start in range(0, pairs, BLOCK):
        chosen = tl.load(experts + start + within, mask=start + within < pairs, other=2**30)
        mine = (chosen == expert).to(tl.int32)
        place = before + count + tl.cumsum(mine, axis=0) - 1
        tl.store(order + place, start + within, mask=mine != 0)
        count += tl.sum(mine, axis=0)
    tl.store(counts + expert, count)


@triton.jit
def find_block(
    experts: tl.tensor,
    counts: tl.tensor,
    block: tl.tensor,
    COUNT: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    DIRECT: tl.constexpr,
) -> tl.tensor:
    """A block's expert, the first of its sorted pairs and how many it has: none past the last.

    DIRECT: pairs are not sorted, and each is a block.
    """
    if DIRECT:
        expert = tl.load(experts + block)
        first = block
        size = block * 0 + 1
    else:
        number = tl.arange(0, COUNT_BLOCK)
        pairs = tl.load(counts + number, mask=number < COUNT, other=0)
        blocks = (pairs + TOKENS - 1) // TOKENS
        expert = tl.sum((tl.cumsum(blocks, axis=0) <= block).to(tl.int32), axis=0)
        below = number < expert
        within = (block - tl.sum(tl.where(below, blocks, 0), axis=0)) * TOKENS
        first = tl.sum(tl.where(below, pairs, 0), axis=0) + within
        size = tl.sum(tl.where(number == expert, pairs, 0), axis=0) - within
    return expert, first, size
