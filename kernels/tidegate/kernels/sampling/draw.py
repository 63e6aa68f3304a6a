"""Kernels of the draw itself: what each tile weighs, then one token per row.

A row keeps every token above its threshold's key and the first few of that key, by id. Its token
is the first at which the running weight, by id, passes the uniform number's share of the whole.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.sampling.search import draw_of, narrowed, ties_kept
from tidegate.kernels.sampling.weighing import (
    COLUMNS,
    LOWEST_KEY,
    MIN_P,
    TEMPERATURE,
    UNIFORM,
    key_of,
    logit_of,
    row_logits,
    weight_of,
)


@triton.jit
def threshold_of(
    row: tl.tensor,
    draw: tl.tuple,
    partials: tl.tensor,
    states: tl.tensor,
    first: tl.tensor,
    LAUNCHES: tl.constexpr,
    SEARCHES: tl.constexpr,
    TILE_COUNT: tl.constexpr,
    TILES: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tl.tuple:
    """The key of a row's threshold, and how many tokens of that key are kept."""
    peak, temperature, min_p, top_p, top_k = draw
    low = tl.zeros((), tl.int64) + LOWEST_KEY
    ties = low * 0
    if SEARCHES > 0:
        twice = (SEARCHES == 2) & (top_k > 0) & (top_p < 1)
        if (top_k > 0) | (top_p < 1):
            last = tl.where(twice, 2 * LAUNCHES, LAUNCHES) - 1
            floor, floor_measure = low - 1, ties
            if twice:
                floor = tl.load(first)
                each = weight_of(logit_of(floor.to(tl.int32)), peak, temperature, min_p)
                floor_measure = tl.load(first + 1) * each
            slab = ((last % 2) * tl.num_programs(0) + row).to(tl.int64) * TILE_COUNT * LEVELS
            state = states + (row * 2 * LAUNCHES + last) * 4
            low, _, above, goal = narrowed(
                state, partials + slab, top_p, floor, floor_measure, TILE_COUNT, TILES, LEVELS
            )
            by_count = (top_k > 0) & (twice == 0)
            ties = ties_kept(low, above, goal, by_count, peak, temperature, min_p)
            if twice & (low == floor):
                ties = tl.minimum(ties, tl.load(first + 1))
    return low, ties


@triton.jit
def weigh_tiles(
    logits: tl.tensor,
    masks: tl.tensor,
    numbers: tl.tensor,
    integers: tl.tensor,
    peaks: tl.tensor,
    part_peaks: tl.tensor,
    partials: tl.tensor,
    states: tl.tensor,
    firsts: tl.tensor,
    cuts: tl.tensor,
    tile_weights: tl.tensor,
    tile_ties: tl.tensor,
    vocab: tl.int32,
    stride: tl.int64,
    words: tl.int32,
    LAUNCHES: tl.constexpr,
    SEARCHES: tl.constexpr,
    TILE_COUNT: tl.constexpr,
    TILES: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> None:
    """The weight above the threshold and the tokens at it, of one tile; both of them in `cuts`."""
    row, tile = tl.program_id(0), tl.program_id(1)
    peak, temperature, min_p, top_p, top_k = draw_of(numbers, integers, peaks, row)
    if not ((peak == peak) & (temperature > 0)):
        return
    low, ties = threshold_of(
        row, (peak, temperature, min_p, top_p, top_k), partials, states, firsts + row * 2, LAUNCHES,
        SEARCHES, TILE_COUNT, TILES, LEVELS,
    )  # fmt: skip
    if tile == 0:
        tl.store(cuts + row * 2, low)
        tl.store(cuts + row * 2 + 1, ties)
    weights, at = tl.zeros((PART,), tl.int64), tl.zeros((PART,), tl.int32)
    for part in range(PARTS):
        top = tl.load(part_peaks + (row * TILE_COUNT + tile) * PARTS + part)
        if key_of(top) >= low:
            ids = (tile * PARTS + part) * PART + tl.arange(0, PART)
            x = row_logits(logits, masks, integers, row, ids, vocab, stride, words)
            key = key_of(x)
            weights += tl.where(key > low, weight_of(x, peak, temperature, min_p), 0)
            at += tl.where(key == low, 1, 0)
    tl.store(tile_weights + row * TILE_COUNT + tile, tl.sum(weights))
    tl.store(tile_ties + row * TILE_COUNT + tile, tl.sum(at))


@triton.jit
def draw_tokens(
    logits: tl.tensor,
    masks: tl.tensor,
    numbers: tl.tensor,
    integers: tl.tensor,
    peaks: tl.tensor,
    cuts: tl.tensor,
    tile_weights: tl.tensor,
    tile_ties: tl.tensor,
    tokens: tl.tensor,
    vocab: tl.int32,
    stride: tl.int64,
    words: tl.int32,
    TILE_COUNT: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The token of one row: its tile by the weights of all, then its place there."""
    row = tl.program_id(0)
    peak = tl.load(peaks + row)
    temperature = tl.load(numbers + row * COLUMNS + TEMPERATURE).to(tl.float32)
    if not ((peak == peak) & (temperature > 0)):
        return
    min_p = tl.load(numbers + row * COLUMNS + MIN_P).to(tl.float32)
    low, kept = tl.load(cuts + row * 2), tl.load(cuts + row * 2 + 1)
    each = weight_of(logit_of(low.to(tl.int32)), peak, temperature, min_p)
    tile = tl.arange(0, TILES)
    mask = tile < TILE_COUNT
    ties = tl.load(tile_ties + row * TILE_COUNT + tile, mask, other=0).to(tl.int64)
    ties_before = tl.cumsum(ties, axis=0) - ties
    taken = tl.minimum(tl.maximum(kept - ties_before, 0), ties)
    weights = tl.load(tile_weights + row * TILE_COUNT + tile, mask, other=0) + taken * each
    sums, whole = tl.cumsum(weights, axis=0), tl.sum(weights)
    target = (tl.load(numbers + row * COLUMNS + UNIFORM) * whole.to(tl.float64)).to(tl.int64)
    target = tl.minimum(target, whole - 1)
    mine = tl.sum(tl.where(sums <= target, 1, 0))
    target -= tl.sum(tl.where(tile < mine, weights, 0))
    rank = kept - tl.sum(tl.where(tile < mine, ties, 0))
    ids = mine * TILE + tl.arange(0, TILE)
    x = row_logits(logits, masks, integers, row, ids, vocab, stride, words)
    key = key_of(x)
    tied = key == low
    keeps = (key > low) | (tied & (tl.cumsum(tl.where(tied, 1, 0), axis=0) <= rank))
    weight = tl.where(keeps, weight_of(x, peak, temperature, min_p), 0)
    before = tl.sum(tl.where(tl.cumsum(weight, axis=0) <= target, 1, 0))
    tl.store(tokens + row, mine * TILE + before)
