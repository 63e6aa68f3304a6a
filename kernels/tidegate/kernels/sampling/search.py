"""The kernel that finds where top-k and top-p cut: an exact threshold, by narrowing an interval.

What is searched is the largest key such that the tokens from it upwards reach a goal: k tokens, or
a share of all weight. Every launch measures LEVELS keys of the interval at once, tile by tile; the
next one adds the tiles up, narrows the interval and goes on in it. An interval of all float32 is
one key after ceil(32 / log2(LEVELS)) launches. Integers throughout, so no order of sums shows.

A row that wants both has a second search, by weight, among the tokens that the first one kept.
Its floor is the key of the first: tokens of that key count as many as were kept, and no more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tidegate.kernels.sampling.weighing import (
    COLUMNS,
    LOWEST_KEY,
    MIN_P,
    REACH,
    TEMPERATURE,
    TOP_P,
    key_of,
    logit_of,
    row_logits,
    weight_of,
)


@triton.jit
def narrowed(
    state: tl.tensor,
    partials: tl.tensor,
    top_p: tl.tensor,
    floor: tl.tensor,
    floor_measure: tl.tensor,
    TILE_COUNT: tl.constexpr,
    TILES: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The interval after a launch: first and last key, what lies above it, and the goal."""
    low, high = tl.load(state), tl.load(state + 1)
    above, goal = tl.load(state + 2), tl.load(state + 3)
    tile, level = tl.arange(0, TILES), tl.arange(0, LEVELS)
    places = tile[:, None] * LEVELS + level[None, :]
    totals = tl.sum(tl.load(partials + places, tile[:, None] < TILE_COUNT, other=0), axis=0)
    step = (high - low) // LEVELS + 1
    totals += tl.where(low + step * level == floor, floor_measure, 0)
    # A goal of 0 is a share of all that the first launch found from the lowest level upwards.
    share = top_p * tl.sum(tl.where(level == 0, totals, 0)).to(tl.float64)
    whole = share.to(tl.int64)
    whole = tl.maximum(whole + tl.where(whole.to(tl.float64) < share, 1, 0), 1)
    known = goal > 0
    settled = known & (low == high)
    goal = tl.where(known, goal, whole)
    at = tl.max(tl.where(totals >= goal, level, 0))
    beyond = low + step * (at + 1)
    passed = tl.sum(tl.where(level == at + 1, totals, 0))
    above = tl.where(settled | (beyond > high), above, passed)
    high = tl.where(settled, high, tl.minimum(high, beyond - 1))
    low = tl.where(settled, low, low + step * at)
    return low, high, above, goal


@triton.jit
def store_state(
    state: tl.tensor, low: tl.tensor, high: tl.tensor, above: tl.tensor, goal: tl.tensor
) -> None:
    """What `narrowed` reads."""
    tl.store(state, low)
    tl.store(state + 1, high)
    tl.store(state + 2, above)
    tl.store(state + 3, goal)


@triton.jit
def draw_of(
    numbers: tl.tensor, integers: tl.tensor, peaks: tl.tensor, row: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Peak, temperature, min-p, top-p and top-k of a row."""
    mine = numbers + row * COLUMNS
    temperature = tl.load(mine + TEMPERATURE).to(tl.float32)
    min_p, top_p = tl.load(mine + MIN_P).to(tl.float32), tl.load(mine + TOP_P)
    return tl.load(peaks + row), temperature, min_p, top_p, tl.load(integers + row * 2)


@triton.jit
def ties_kept(
    low: tl.tensor,
    above: tl.tensor,
    goal: tl.tensor,
    by_count: tl.tensor,
    peak: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
) -> tl.tensor:
    """How many tokens of the threshold's own key are kept, the first ones by id."""
    each = weight_of(logit_of(low.to(tl.int32)), peak, temperature, min_p)
    each = tl.where(by_count, 1, tl.maximum(each, 1))
    return (goal - above + each - 1) // each


@triton.jit
def interval_of(
    state: tl.tensor,
    partials: tl.tensor,
    first: tl.tensor,
    launch: tl.int32,
    draw: tl.tuple,
    by_count: tl.tensor,
    LAUNCHES: tl.constexpr,
    SECOND: tl.constexpr,
    TILE_COUNT: tl.constexpr,
    TILES: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tl.tuple:
    """What a launch measures, as `narrowed` has it, and the key that tokens must be above.

    `state` and `partials` are those of the launch before, `first` is where a second search finds
    the key and the ties of the first one; its own first launch puts them there.
    """
    peak, temperature, min_p, top_p, top_k = draw
    # The whole of what has any weight, for the first launch.
    low = key_of(peak - REACH * temperature).to(tl.int64)
    high = key_of(peak).to(tl.int64)
    above = high * 0
    goal = tl.where(by_count, top_k, 0).to(tl.int64)
    floor, floor_measure = above + LOWEST_KEY - 1, above
    if SECOND:
        if launch == LAUNCHES:
            low, _, first_above, first_goal = narrowed(
                state, partials, top_p, floor, floor_measure, TILE_COUNT, TILES, LEVELS
            )
            floor, ties = low, first_goal - first_above
            tl.store(first, floor)
            tl.store(first + 1, ties)
        else:
            floor, ties = tl.load(first), tl.load(first + 1)
        floor_measure = ties * weight_of(logit_of(floor.to(tl.int32)), peak, temperature, min_p)
    if launch % LAUNCHES != 0:
        low, high, above, goal = narrowed(
            state, partials, top_p, floor, floor_measure, TILE_COUNT, TILES, LEVELS
        )
    return low, high, above, goal, floor


@triton.jit(do_not_specialize=["launch"])
def search(
    logits: tl.tensor,
    masks: tl.tensor,
    numbers: tl.tensor,
    integers: tl.tensor,
    peaks: tl.tensor,
    part_peaks: tl.tensor,
    partials: tl.tensor,
    states: tl.tensor,
    firsts: tl.tensor,
    vocab: tl.int32,
    stride: tl.int64,
    words: tl.int32,
    launch: tl.int32,
    LAUNCHES: tl.constexpr,
    SECOND: tl.constexpr,
    TILE_COUNT: tl.constexpr,
    TILES: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    LEVELS: tl.constexpr,
) -> None:
    """One launch of LAUNCHES, or of as many more for the SECOND search; see the module.

    partials: int64 [2, B, tiles, LEVELS], written and read in turns. states: int64 [B, 2 *
    LAUNCHES, 4], the interval that each launch measures. firsts: int64 [B, 2], the first search's
    key and ties.
    """
    row, tile = tl.program_id(0), tl.program_id(1)
    peak, temperature, min_p, top_p, top_k = draw_of(numbers, integers, peaks, row)
    by_count = (top_k > 0) & (not SECOND)
    wanted = (peak == peak) & (temperature > 0)
    wanted = wanted & (((top_k > 0) & (top_p < 1)) if SECOND else ((top_k > 0) | (top_p < 1)))
    if not wanted:
        return
    slab = TILE_COUNT * LEVELS
    before = partials + (((launch + 1) % 2) * tl.num_programs(0) + row).to(tl.int64) * slab
    after = partials + ((launch % 2) * tl.num_programs(0) + row).to(tl.int64) * slab
    state = states + (row * 2 * LAUNCHES + launch) * 4
    low, high, above, goal, floor = interval_of(
        state - 4, before, firsts + row * 2, launch, (peak, temperature, min_p, top_p, top_k),
        by_count, LAUNCHES, SECOND, TILE_COUNT, TILES, LEVELS,
    )  # fmt: skip
    if tile == 0:
        store_state(state, low, high, above, goal)
    if (low == high) & (goal > 0):
        return
    step = (high - low) // LEVELS + 1
    levels = tl.minimum(low + step * tl.arange(0, LEVELS), high + 1).to(tl.int32)
    measured = tl.zeros((LEVELS, PART), tl.int64)
    for part in range(PARTS):
        top = tl.load(part_peaks + (row * TILE_COUNT + tile) * PARTS + part)
        if key_of(top) >= low:
            ids = (tile * PARTS + part) * PART + tl.arange(0, PART)
            x = row_logits(logits, masks, integers, row, ids, vocab, stride, words)
            key = key_of(x)
            weight = tl.where(by_count, 1, weight_of(x, peak, temperature, min_p))
            weight = tl.where(key > floor, weight, 0)
            measured += tl.where(key[None, :] >= levels[:, None], weight[None, :], 0)
    tl.store(after + tile * LEVELS + tl.arange(0, LEVELS), tl.sum(measured, axis=1))
